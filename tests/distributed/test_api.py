"""Jobs that a program calls: the code of docs/api.md, and several jobs in one process, on one rank and on two."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from compare import assert_same_bits
from launching import ROOT, finished, start
from safetensors.torch import load_file
from tiny_world import TinyWorld

from engine.records.records import read_records

pytestmark = pytest.mark.launcher

STUDENT = {"layers": 2, "init": "uniform"}
TRAIN = {"global_batch": 8, "lr": 3e-3}
DEEPSPEED = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}


def write_examples(folder: Path, world: TinyWorld, glue: Path) -> None:
    """Writes the files that the page names, over the tiny world in place of the quick start's."""
    (folder / "examples").mkdir()
    (folder / "models").mkdir()
    (folder / "models" / "all-MiniLM-L6-v2").symlink_to(world.teacher)
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    common = {"deepspeed_config": "ds.json"}
    distil = {
        **common,
        "teacher": {"path": str(world.teacher)},
        "student": STUDENT,
        "data": {"path": str(world.corpus)},
    }
    task = {"data_dir": str(glue)}
    train = {**TRAIN, "log_every": 1, "save_every": 0}
    files = {
        "quickstart": {**distil, "data": {**distil["data"], "eval_sequences": 20}, "train": train},
        "proxy": {**distil, "train": TRAIN},
        "search": {
            **distil,
            "train": TRAIN,
            "task": task,
            "proxy": {"tasks": ["SST-2"], "yardstick": {"SST-2": {"start": 0.4, "teacher": 0.95}}},
            "search": {"confirm_top": 0},
        },
        "finetune": {**common, "task": {**task, "name": "RTE", "epochs": 1, "batch": 8}},
    }
    for name, settings in files.items():
        (folder / "examples" / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def run_program(folder: Path, text: str, *, ranks: int = 1) -> str:
    """Runs a program in this folder, and returns its output."""
    path = folder / "program.py"
    path.write_text(f"import os\nos.chdir({str(folder)!r})\n{text}")
    return finished(start([str(path)], ranks=ranks), expect=0)


def test_the_code_of_the_page_runs(tiny_world: TinyWorld, glue: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(code) == 5
    assert code[0].count("\n") <= 10, "the page promises to be short"
    write_examples(tmp_path, tiny_world, glue)
    jobs_of_search = f"import sys\nimport ga.search\nsys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n"
    jobs_of_search += "from stand_in_driver import StandInPool"
    output = run_program(tmp_path, f"{jobs_of_search}\nga.search.JobPool = StandInPool\n" + "\n".join(code))
    runs = tmp_path / "runs"
    assert "\nruns/short/student\n" in output
    for name in ("short", "l1", "best"):
        assert (runs / name / "student" / "model.safetensors").is_file()
    step = next(one for one in read_records(runs / "l1" / "records.jsonl") if one["kind"] == "step" and "terms" in one)
    assert {"hidden_l1/1-2", "hidden_l1/2-4"} < step["terms"].keys()
    assert "hidden" not in step["losses"]
    baselines = next(one for one in read_records(runs / "own-scores" / "records.jsonl") if "teacher" in one)
    assert baselines["teacher"]["similarity"] == pytest.approx(1.0)
    assert baselines["start"]["similarity"] < 1.0
    assert (runs / "found" / "report" / "REPORT.md").is_file()
    assert "@record" not in output


PROGRAM = """
import os
import signal
import sys

import psutil
from torch import nn

from engine.api import distill
from engine.errors import Diverged, Preempted, UserError
from engine.losses.base import Evaluated, HiddenMapped


class Mapped(HiddenMapped):
    name = "mapped"

    def build_head(self):
        return nn.Linear(32, 32)

    def __call__(self, inputs, weights):
        values = {}
        for pair in self.pairs:
            state, target = inputs.hidden_states(self.name, (pair.student, pair.teacher))
            distance = (inputs.heads[self.name](state) - target).square().mean(-1)
            if inputs.rows.mask is not None:
                distance = distance * inputs.rows.mask
            values[f"mapped/{pair}"] = distance.sum() / inputs.per_micro.tokens
        return Evaluated.weighted(values, weights)


def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return dict(os.environ), handlers, sys.stdout, sys.stderr, sys.excepthook, psutil.Process().children()


def call(name, own_losses=None, on_record=None, **more):
    settings = {"train.steps": 4, "output_dir": f"runs/{name}", **more}
    before = state()
    try:
        result = distill("examples/quickstart.yaml", settings, own_losses=own_losses, on_record=on_record)
        say(f"{name} done, held out {[loss['step'] for loss in result.held_out]}")
    except (Diverged, Preempted, UserError) as error:
        say(f"{name} {type(error).__name__} {error}")
    assert state() == before


def say(line):
    os.write(1, f"{line}\\n".encode())  # at once: the ranks share a pipe


def stop(record):
    if record["kind"] == "step" and record["step"] == 2:
        os.kill(os.getpid(), signal.SIGNAL)


own = {Mapped: 0.5}
call("stopped", own, stop)
call("stopped", own)
call("whole", own)
call("stopped")
call("bad", **{"train.lr": 1e30})
say("reached the end")
"""
"""Several jobs of one process, with a loss that trains weights of its own."""


@pytest.mark.thorough
@pytest.mark.parametrize(("ranks", "number"), [(1, "SIGINT"), (2, "SIGTERM")])
def test_jobs_of_one_process_do_not_see_each_other(
    ranks: int, number: str, tiny_world: TinyWorld, glue: Path, tmp_path: Path
) -> None:
    write_examples(tmp_path, tiny_world, glue)
    output = run_program(tmp_path, PROGRAM.replace("SIGNAL", number), ranks=ranks)
    for line in (
        "stopped Preempted runs/stopped: stopped, and saved; the same call continues",
        "stopped done, held out [0, 4]",
        "whole done, held out [0, 4]",
        "stopped UserError cannot continue step-00000004 in runs/stopped: the run was changed in what it computes "
        "(loss.mapped: 0.5 -> None; loss.mapped.source: ",
        "bad Diverged runs/bad: the losses or weights were not finite; its records say where",
        "reached the end",
    ):
        assert output.count(line) == ranks, line
    assert "mapped trains 0.00 M parameters of its own, which are not exported" in output
    stopped, whole = (
        load_file(tmp_path / "runs" / name / "student" / "model.safetensors") for name in ("stopped", "whole")
    )
    assert_same_bits(stopped, whole)
    statuses = [one.get("status") for one in read_records(tmp_path / "runs" / "stopped" / "records.jsonl")]
    assert statuses.count("preempted") == 1
