"""Calls the main of a script of launch/ in this process: for what ends before ranks meet, without the seconds that a
fresh Python needs for its imports."""

from __future__ import annotations

import io
import sys
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import pytest
from launching import ROOT, Run

from engine.cli import distill_main, export_main, finetune_main, measure_main, prepare_main, proxy_main, score_main
from engine.hub.files import allow_pickle
from engine.ranks import watchdog
from ga.cli import search_main

MAINS = {
    "distill": distill_main,
    "proxy": proxy_main,
    "search": search_main,
    "finetune": finetune_main,
    "prepare_data": prepare_main,
    "export": export_main,
    "measure": measure_main,
    "score": score_main,
}


def call(script: str, *words: object, cwd: Path = ROOT) -> tuple[int, str]:
    """Exit code and output of a script that starts no ranks. Streams, folder and switches of this process are
    afterwards as before."""
    output, answers = io.StringIO(), io.StringIO("y\n" * 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setattr(sys, "stdin", answers)
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", output)
        patch.setattr(watchdog, "start_guard", _start_guard)
        code = MAINS[script](list(map(str, words)))
    allow_pickle(False)
    assert answers.tell() == 0, f"{script} has asked a question:\n{output.getvalue()}"
    return code, output.getvalue()


def succeed(script: str, *words: object, cwd: Path = ROOT) -> str:
    """The output of a script that must end with exit code 0."""
    code, output = call(script, *words, cwd=cwd)
    assert code == 0, output
    return output


def refuse(script: str, *words: object) -> str:
    """The one line that a script refuses its input with, before it has written anything."""
    folders = [Path(str(value)) for key, value in pairwise(words) if key == "--output_dir"]
    before = [_contents(folder) for folder in folders]
    code, output = call(script, *words)
    assert code == 2, output
    assert [_contents(folder) for folder in folders] == before
    return only_error(output)


def refuse_run(run: Run, *more: object) -> str:
    """The same for the script and the words of a run."""
    return refuse(Path(run.script).stem, "--output_dir", run.output_dir, *run.argv, *more)


def only_error(output: str) -> str:
    """The line of an output that starts with `error: `. There must be one, and no traceback."""
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    return errors[0]


def _contents(folder: Path) -> list[Path]:
    return sorted(path for path in (folder, *folder.rglob("*")) if path.exists())


def _start_guard() -> NoReturn:
    raise AssertionError("this starts ranks: give it a process of its own")
