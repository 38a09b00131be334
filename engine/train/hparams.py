"""A run's row of TensorBoard's HPARAMS page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboard.plugins.hparams import api_pb2

from engine.records.events import EventFile
from engine.records.run_dir import EVENT_FILES

TEXT, NUMBER = api_pb2.DATA_TYPE_STRING, api_pb2.DATA_TYPE_FLOAT64
COLUMNS = {
    "teacher": TEXT,
    "student": TEXT,
    "mapping": TEXT,
    "losses": TEXT,
    "task": TEXT,
    "lr": NUMBER,
    "batch": NUMBER,
    "steps": NUMBER,
    "epochs": NUMBER,
    "seed": NUMBER,
}
"""Hyper-parameters of distillations and fine-tunings. The page takes its columns from the first run that it finds: they
are the same for all, so that one page shows both."""
METRICS = ("loss", "held_out_loss", "score")
_SUFFIX = ".hparams"


def write_hparams(
    folder: Path, values: Mapping[str, float | str], metrics: Mapping[str, float], *, tell: Callable[[str], None]
) -> None:
    """Writes the row of a run that has ended into a file of its own, in place of an earlier one. values: some of
    COLUMNS. metrics: some of METRICS. tell: as for EventFile."""
    for earlier in folder.glob(f"{EVENT_FILES}*{_SUFFIX}"):
        earlier.unlink()
    file = EventFile(folder, suffix=_SUFFIX, tell=tell)
    file.hparam_columns(
        [api_pb2.HParamInfo(name=name, type=kind) for name, kind in COLUMNS.items()],
        [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=_tag(name)), display_name=name) for name in METRICS],
    )
    file.hparam_session(values, {_tag(name): value for name, value in metrics.items()}, when=time.time())
    file.close()


def _tag(metric: str) -> str:
    return f"result/{metric}"  # below the curves on the page
