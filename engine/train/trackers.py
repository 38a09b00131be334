"""Weights & Biases, Comet and CSV files, through DeepSpeed's own monitor: they are sent what TensorBoard shows."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import first_line
from engine.records.records import read_records
from engine.records.run_dir import RunDir

TRACKED = "tracked"
"""Status of the `run` record of a start whose points are sent."""
Section = Mapping[str, Any]


class Trackers:
    """The services that are sent the points of one run. One that fails is left out from then on: training continues."""

    def __init__(self, sections: Mapping[str, Section], run_dir: RunDir, *, tell: Callable[[str], None]) -> None:
        """Opens them, for a new run or for one that is continued. sections: those of a DeepSpeed file, by name. tell:
        prints a line, when one of them fails. Needs a process group; for rank 0."""
        key, self._sent = _read_sent(run_dir.records)
        self.key = key or uuid.uuid4().hex
        """Name of the run at the services, 32 letters and digits; the same when it is continued."""
        self._tell = tell
        self._monitors: dict[str, Any] = {}
        for name, section in sections.items():
            with self._left_out_on_failure(name):
                self._monitors[name] = _open(name, section, self.key, run_dir)

    def send(self, kind: str, points: Mapping[str, float], step: int) -> None:
        """Sends points by tag. kind: field of a step record (total, held_out or scores) that has the same facts: a
        step that an earlier start has sent is not sent again, since a service keeps both."""
        if step <= self._sent.get(kind, -1):
            return
        events = [(tag, value, step) for tag, value in points.items()]
        for name, monitor in list(self._monitors.items()):
            with self._left_out_on_failure(name):
                monitor.write_events(events)

    @contextmanager
    def _left_out_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any service, above all of its network
            self._monitors.pop(name, None)
            self._tell(f"warning: {name} has failed ({first_line(error)}); training continues without it")

    def close(self) -> None:
        """Ends the run at the services: the next fine-tuning of a job is a run of its own."""
        for name, monitor in list(self._monitors.items()):
            with self._left_out_on_failure(name):
                if name == "wandb":  # DeepSpeed's monitor has no end
                    import wandb

                    wandb.teardown()
                elif name == "comet":
                    monitor.comet_monitor.experiment.end()


def _read_sent(records: Path) -> tuple[str | None, dict[str, int]]:
    """Returns the key of a run, or None where it has not been tracked, and the last step that was sent, by kind."""
    key: str | None = None
    sent: dict[str, int] = {}
    tracked = False
    for record in read_records(records):
        if record["kind"] == "run" and record["status"] in ("started", TRACKED):
            tracked = record["status"] == TRACKED
            key = record["key"] if tracked else key
        elif record["kind"] == "step" and tracked:
            for kind in record.keys() & {"total", "held_out", "scores"}:
                sent[kind] = max(record["step"], sent.get(kind, -1))
    return key, sent


def _open(name: str, section: Section, key: str, run_dir: RunDir) -> Any:
    """Returns DeepSpeed's monitor of one service, which knows the run by its key, or by its folder."""
    from deepspeed.monitor.config import get_monitor_config  # only here: importing it costs seconds
    from deepspeed.monitor.monitor import MonitorMaster

    folder = str(run_dir.root)
    ours: dict[str, dict[str, Any]] = {
        "comet": {"experiment_name": folder, **section, "experiment_key": key, "samples_log_interval": 1},
        "csv_monitor": {**section, "output_path": folder, "job_name": run_dir.csv.name},
    }
    environment = {
        "WANDB_RUN_ID": key,
        "WANDB_RESUME": "allow",
        "WANDB_NAME": folder[-128:],
        "WANDB_DIR": folder,
        "COMET_OFFLINE_DIRECTORY": str(run_dir.root / "comet"),
    }
    with _default_environment(environment):
        monitor = MonitorMaster(get_monitor_config({name: ours.get(name, section)}))
    if monitor.csv_monitor is not None:  # until DeepSpeed > 0.19.8: it writes the header again
        monitor.csv_monitor.filenames += [path.stem for path in run_dir.csv.glob("*.csv")]
    return monitor


@contextmanager
def _default_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables inside, unless the user has set them."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
