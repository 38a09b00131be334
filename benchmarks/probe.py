"""Scores models as a proxy job scores its students (cross-validated probes on training rows), from the last layer and
from all of them, whole or with some of their layers only.

    python benchmarks/probe.py models/all-MiniLM-L6-v2 --layers 2-4-6 --train_rows 8551 --task_dir data/glue
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace

os.environ.setdefault("DS_LOG_LEVEL", "error")

import torch
from measuring import header
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertModel

from engine.config.finetune import TaskDataConfig
from engine.data.batch import Batch
from engine.jobs.proxy.evaluators import ProbeEvaluator
from engine.models.capture import inputs_of
from engine.ranks.runtime import join_ranks
from engine.tasks.load import load_task

FOLDS = 5


class Whole:
    """A model that is not trained further, as an evaluator sees a student."""

    seed = 0

    def __init__(self, model: BertModel) -> None:
        self._model = model.float().eval()

    @property
    def layers(self) -> int:
        return self._model.config.num_hidden_layers

    def hidden(self, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
        states = self._model(**inputs_of(batch), output_hidden_states=True).hidden_states
        return tuple(states[layer] for layer in sorted(layers))


def students(folder: str, layers: list[str]) -> Iterator[tuple[str, Whole]]:
    """Yields the model of `folder`, then one for each text of layers ("2-4-6"), counted from 1."""
    yield folder, Whole(AutoModel.from_pretrained(folder))
    for text in layers:
        model = AutoModel.from_pretrained(folder)
        kept = [model.encoder.layer[int(layer) - 1] for layer in text.split("-")]
        model.encoder.layer, model.config.num_hidden_layers = nn.ModuleList(kept), len(kept)
        yield f"{folder}, layers {text}", Whole(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER", help="BERT-like, with one tokenizer")
    parser.add_argument("--layers", nargs="*", default=[])
    parser.add_argument("--tasks", nargs="+", default=["CoLA"])
    parser.add_argument("--train_rows", type=int, default=2000)
    parser.add_argument("--task_dir", default="data/glue")
    args = parser.parse_args()
    runtime = join_ranks(0)
    tokenizer = AutoTokenizer.from_pretrained(args.models[0])
    data = [load_task(name, TaskDataConfig(data_dir=args.task_dir, train_rows=args.train_rows)) for name in args.tasks]

    def evaluator(*, every_layer: bool) -> ProbeEvaluator:
        tasks = [replace(task, spec=replace(task.spec, every_layer=every_layer)) for task in data]
        return ProbeEvaluator(tasks, tokenizer, longest=128, folds=FOLDS, runtime=runtime)

    columns = {"last layer": evaluator(every_layer=False), "all layers": evaluator(every_layer=True)}
    print(header("model", "task", *columns))
    for folder in args.models:
        for name, student in students(folder, args.layers):
            scores = [evaluate(student).tasks for evaluate in columns.values()]
            for task in args.tasks:
                print(f"| {name} | {task} | {' | '.join(f'{score[task]:.3f}' for score in scores)} |", flush=True)


if __name__ == "__main__":
    main()
