"""Zero-shot STS-B of models: cosine of mean-pooled last hidden states, on the dev rows.

python benchmarks/zero_shot.py models/all-MiniLM-L6-v2 runs/quickstart/student --task_dir data/glue
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModel, AutoTokenizer

from engine.config.finetune import TaskDataConfig
from engine.models.pooling import pool
from engine.tasks.load import load_task
from engine.tasks.metrics import score_task
from engine.tasks.probe import ProbeFeatures, probe_outputs
from engine.tasks.rows import Split

AT_ONCE = 64


@torch.no_grad()
def features(folder: str, texts: list[str]) -> torch.Tensor:
    """(n, D) float32."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    pooled = []
    for start in range(0, len(texts), AT_ONCE):
        batch = tokenizer(
            texts[start : start + AT_ONCE], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        pooled.append(pool(model(**batch).last_hidden_state, batch["attention_mask"]))
    return torch.cat(pooled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER")
    parser.add_argument("--task_dir", default="data/glue")
    args = parser.parse_args()
    task = load_task("STS-B", TaskDataConfig(data_dir=args.task_dir))
    rows = task.splits["dev"]
    assert isinstance(rows, Split)
    assert rows.second is not None
    assert rows.labels is not None
    for folder in args.models:
        pairs = ProbeFeatures(features(folder, rows.first), features(folder, rows.second))
        scores = score_task(task.spec, probe_outputs(task.spec, None, None, {"dev": pairs})["dev"], rows.labels)
        print(f"{folder}: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}")


if __name__ == "__main__":
    main()
