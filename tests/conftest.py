"""Fixtures that several tiers share: a tiny teacher with a prepared corpus, and small runs of the real scripts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from glue_sample import write_glue_sample
from interpreter import import_triton_interpreted
from launching import Launcher, Run, write_ds_config
from tiny_world import TinyWorld, save_tiny_teacher, write_text

from engine.ranks.runtime import has_fp16

pytest_plugins = ["no_flock", "postgres", "searching", "small_disk"]

if not torch.cuda.is_available():
    import_triton_interpreted()

hypothesis.settings.register_profile("untimed", deadline=None)  # machines are busy; speed is measured in benchmarks/
hypothesis.settings.load_profile("untimed")

# Two threads on two busy cores wait for each other longer than they work; the tests' tensors are tiny anyway.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 3}},
}

MakeRun = Callable[..., Run]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    left_out = {}
    if "MAPDISTILL_FAULTS" not in os.environ:
        left_out["thorough"] = pytest.mark.skip(reason="a row of `make test-all` (it sets MAPDISTILL_FAULTS)")
    if any(item.get_closest_marker("fp16") for item in items) and not has_fp16():
        left_out["fp16"] = pytest.mark.skip(reason="this processor has no AVX-512 FP16, so DeepSpeed refuses fp16")
    for item in items:
        for name, skip in left_out.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    from engine.config.tools import PrepareConfig, SourceConfig
    from engine.data.prepare.corpus import prepare

    root = tmp_path_factory.mktemp("tiny world")  # the space in its name is on purpose
    world = TinyWorld(root / "teacher", root / "corpus", root / "text.txt")
    save_tiny_teacher(world.teacher)
    write_text(world.text, 300)
    prepare(
        PrepareConfig(
            sources=[SourceConfig(path=str(world.text))],
            output_dir=str(world.corpus),
            tokenizer=str(world.teacher),
            seq_len=16,
            min_tokens=2,
            workers=1,
        )
    )
    return world


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a few rows of some tasks in GLUE's layout."""
    folder = tmp_path_factory.mktemp("tiny glue")
    write_glue_sample(folder)
    return folder


def run_maker(tiny_world: TinyWorld, folder: Path) -> MakeRun:
    """make_run(name, stage=…, precision=…, micro=…, ranks=…, **settings): a small distillation, 4 x 32 -> 2 x 16."""

    def make(
        name: str,
        *,
        stage: int = 1,
        precision: str = "fp32",
        micro: int | str = "auto",
        ranks: int = 1,
        launcher: Launcher = "forked",
        zero: dict[str, Any] | None = None,
        trackers: dict[str, Any] | None = None,
        **settings: object,
    ) -> Run:
        ds = write_ds_config(
            folder / f"ds {name}",
            train_micro_batch_size_per_gpu=micro,
            zero_optimization={"stage": stage, **(zero or {})},
            **PRECISION[precision],
            **(trackers or {}),
        )
        values: dict[str, object] = {
            "deepspeed_config": ds,
            "teacher.path": tiny_world.teacher,
            "student.layers": 2,
            "student.hidden_size": 16,
            "student.init": "mapping",
            "data.path": tiny_world.corpus,
            "data.eval_sequences": 20,
            "train.steps": 6,
            "train.global_batch": 8,
            "train.lr": 3e-3,
            "train.warmup_steps": 2,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.save_every": 0,
            "measure": False,
        }
        values.update({key.replace("__", "."): value for key, value in settings.items()})
        argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        return Run(folder / name, ranks=ranks, argv=argv, launcher=launcher)

    return make


@pytest.fixture
def make_run(tiny_world: TinyWorld, tmp_path: Path) -> MakeRun:
    return run_maker(tiny_world, tmp_path)


@pytest.fixture(scope="module")
def finished_run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """finished_run(**settings of make_run): run to its end, once for all tests of the module that ask for the same.
    They look at it, or change a copy."""
    make = run_maker(tiny_world, tmp_path_factory.mktemp("finished"))
    runs: dict[str, Run] = {}

    def finish(**settings: Any) -> Run:
        key = repr(sorted(settings.items()))
        if key not in runs:
            run = make(f"run {len(runs)}", **settings)
            run.finish()
            runs[key] = run
        return runs[key]

    return finish
