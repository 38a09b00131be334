"""A script of one rank that fine-tunes many times: python many_fine_tunings.py DATA_DIR MODEL DS_CONFIG "SEEDS"."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from engine.config.distill import OptimConfig
from engine.config.finetune import TaskDataConfig
from engine.hub.config import load_config
from engine.jobs.execution import plan_execution
from engine.ranks.exit import run_rank
from engine.ranks.runtime import StopRequest, join_ranks
from engine.tasks.encode import encode_task
from engine.tasks.load import load_task
from engine.tasks.model import load_task_model, task_tokenizer
from engine.tasks.module import TaskModule
from engine.tasks.train import Recipe, task_train_config, train_on_task
from engine.train.monitor import Monitor


def train_many(data_dir: str, model: str, ds_config: str, seeds: str) -> int:
    """Prints what each fine-tuning gave, and how many TaskModules are still alive."""
    runtime = join_ranks(0)
    data = load_task("RTE", TaskDataConfig(data_dir=data_dir))
    tokenizer, _ = task_tokenizer(model, "model.path", load_config(model, "model.path"))
    task = encode_task(data, tokenizer, seq_len=64)
    train = task_train_config(len(task.train), epochs=2, lr=3e-3, batch=8)
    execution = plan_execution(ds_config, train, OptimConfig())
    stop = StopRequest()
    results = []
    for seed in map(int, seeds.split()):
        student = load_task_model(model, key="model.path", spec=data.spec, dropout=0.1, seed=seed, backend="sdpa")
        module = TaskModule(student, kind=data.spec.kind)
        monitor = Monitor(
            active=False, tensorboard=Path("none"), records=Path("none"), steps=train.steps, flops_per_token=1.0,
            device=runtime.device, config_text="",
        )  # fmt: skip
        recipe = Recipe(train=train, optim=OptimConfig(), execution=execution, seed=seed)
        found = train_on_task(module, task, recipe, runtime=runtime, stop=stop, monitor=monitor)
        weight = student.classifier.weight
        held = getattr(weight, "ds_tensor", weight).detach().double()
        results.append([found.score, found.step, held.sum().item(), held.square().sum().item()])
        del student, module, weight, held, found
    gc.collect()
    left = sum(type(thing).__name__ == "TaskModule" for thing in gc.get_objects())
    print(json.dumps({"results": results, "modules_left": left}))
    return 0


if __name__ == "__main__":
    run_rank(lambda: train_many(*sys.argv[1:]))
