"""The layer reduction of sentence-transformers: its trainer and its mean squared error, on the sentences of a corpus.

    python benchmarks/layer_reduction.py --corpus data/sentences --steps 300 --output_dir runs/theirs

As its documentation has it (examples/sentence_transformer/training/distillation/model_distillation.py): the teacher's
vectors of all sentences first; a student of some of the teacher's layers; AdamW, a warm-up of a tenth, a linear decay.
`--student` starts from another model instead; a narrower one learns from a PCA of the teacher's vectors. embeddings.py
compares."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MSELoss
from sklearn.decomposition import PCA

from engine.data.manifest import load_manifest
from engine.data.shards import SequenceStore

PCA_SENTENCES = 20_000


def sentences(corpus: Path, tokenizer: object, count: int, seed: int) -> list[str]:
    """Returns some of the corpus, drawn by the seed. The uncased tokenizer makes the same tokens of them again."""
    store = SequenceStore(corpus, load_manifest(corpus))
    drawn = np.random.default_rng(seed).permutation(len(store))[:count]
    return tokenizer.batch_decode(store.rows(drawn), skip_special_tokens=True)


def reduce_layers(teacher: SentenceTransformer, path: str, keep: list[int]) -> SentenceTransformer:
    student = SentenceTransformer(path, device=str(teacher.device))
    model = student[0].auto_model
    model.encoder.layer = torch.nn.ModuleList(model.encoder.layer[at] for at in keep)
    model.config.num_hidden_layers = len(keep)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="models/all-MiniLM-L6-v2")
    parser.add_argument("--student", help="unset: some of the teacher's layers")
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 3, 5], help="layers of the teacher, from 0")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    teacher = SentenceTransformer(args.teacher)
    student = SentenceTransformer(args.student) if args.student else reduce_layers(teacher, args.teacher, args.keep)
    texts = sentences(args.corpus, teacher.tokenizer, args.steps * args.batch, args.seed)
    vectors = teacher.encode(texts, batch_size=args.batch)
    width = student.get_embedding_dimension()
    if width < vectors.shape[1]:
        # As theirs does: the components alone, without the mean.
        vectors = vectors @ PCA(width, random_state=0).fit(vectors[:PCA_SENTENCES]).components_.T
    data = Dataset.from_dict({"sentence": texts, "label": vectors.astype(np.float32)})
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            warmup_steps=0.1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
        )
        trainer = SentenceTransformerTrainer(student, settings, train_dataset=data, loss=MSELoss(student))
        found = trainer.train()
    student.save_pretrained(str(args.output_dir / "student"))
    print(json.dumps({"loss": found.training_loss, "seconds": found.metrics["train_runtime"]}))


if __name__ == "__main__":
    main()
