"""What a user sees of a run: progress, records, TensorBoard. Rank 0 shows it; other ranks keep silent."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from engine.ranks import watchdog
from engine.records.events import EventFile
from engine.records.history import History
from engine.records.records import OnRecord, RecordWriter
from engine.records.run_dir import HELD_OUT, RunDir
from engine.train import failures
from engine.train.failures import Failure
from engine.train.hparams import write_hparams
from engine.train.progress import Progress
from engine.train.step_report import Speedometer, StepReport
from engine.train.trackers import TRACKED, Section, Trackers

TFLOPS_NOTE = (
    "Achieved TFLOP/s of all ranks: real tokens per second times the FLOPs of a token: the teacher's forward plus "
    "three times the forward of student and projections (a backward pass costs twice its forward; recomputation by "
    "activation checkpointing is not counted). A forward counts 2 FLOPs for each weight of a linear layer, and "
    "4 x sequence length x width for attention in each layer. Losses, norms, look-ups and the optimizer are left out."
)


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak of this rank: device memory on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def open_records(
    path: Path,
    *,
    echo: bool = False,
    tell: Callable[[str], None] | None = None,
    on_record: OnRecord | None = None,
) -> RecordWriter:
    """Opens records.jsonl for appending. echo: whether stdout gets all records, and not only those that the file has no
    room for; a terminal, and a program that gets them itself, has none there. tell: prints a line, when the disk does
    not take a record. on_record: is called with each record."""
    silent = on_record is not None or sys.stdout.isatty()
    return RecordWriter(path, echo=echo, stream=_Silent() if silent else None, tell=tell, on_record=on_record)


class Monitor:
    """Progress, records and curves of one model in training."""

    def __init__(
        self,
        *,
        active: bool,
        tensorboard: Path,
        records: Path,
        steps: int,
        flops_per_token: float,
        device: torch.device,
        config_text: str,
        trackers: Mapping[str, Section] = MappingProxyType({}),
        labels: dict[str, Any] | None = None,
        name: str = "",
        on_record: OnRecord | None = None,
    ) -> None:
        """Shows nothing before `begin`.

        active: whether this rank shows anything (rank 0). trackers: sections of the DeepSpeed file, for Trackers.
        labels: fields that every record gets, e.g. which of several models it is about. name: of the model, where lines
        of several are mixed; they then have no bar. on_record: is called with each record.
        """
        self._active = active
        self._progress = Progress(steps, name)
        self._labels = labels or {}
        self._device = device
        self._config_text = config_text
        self._tensorboard_dir = tensorboard
        self._curves: EventFile | None = None
        self._held_out_curves: EventFile | None = None
        self._tracker_sections = trackers
        self._trackers: Trackers | None = None
        self.records = open_records(records, tell=self.say, on_record=on_record) if active else None
        self.history = History()
        self._records_path = records
        self._speedometer = Speedometer(flops_per_token)

    @classmethod
    def silent(cls, run_dir: RunDir, *, steps: int, device: torch.device) -> Monitor:
        """Returns a monitor for work within a job that shows nothing of it, but for what ends the job: that is recorded
        on every rank."""
        return cls(
            active=False,
            tensorboard=run_dir.tensorboard,
            records=run_dir.records,
            steps=steps,
            flops_per_token=0.0,
            device=device,
            config_text="",
        )

    def watch_hangs(
        self, name: str, *, step: Callable[[], int], rank: int, limit_s: float
    ) -> AbstractContextManager[None]:
        """Ends a rank that hangs inside (engine/ranks/watchdog.py), with a record and its stacks in hangs/. name: of
        that file's beginning. step: returns the step that was begun last."""
        host = platform.node()
        stacks = self._records_path.parent / "hangs" / f"{name}-{host}-rank-{rank:05d}.txt"

        def report_hang() -> None:  # on the watchdog's thread, just before the process ends
            failure = failures.hang(step(), rank=rank, host=host, limit_s=limit_s, stacks=stacks)
            print(failure.text, file=sys.stderr, flush=True)
            self.record_from_any_rank(failure)

        return watchdog.watch(limit_s, stacks, report_hang)

    def begin(self, step: int) -> None:
        """Starts to show and to count, after `step`."""
        if self._active:
            self._open_curves(step)
            self._progress.begin(step)
        self._speedometer.begin()

    def _open_curves(self, step: int) -> None:
        """Reads what earlier starts have shown, and opens what shows the rest."""
        self.history = History.read(self._records_path, until=step, labels=self._labels)
        # a resumed run overwrites the points that a killed one wrote past its last checkpoint
        purge = step + 1 if step else None
        self._curves = EventFile(self._tensorboard_dir, purge_step=purge, tell=self.say)
        self._held_out_curves = EventFile(self._tensorboard_dir / HELD_OUT, purge_step=purge, tell=self.say)
        texts = {"config": f"```yaml\n{self._config_text}\n```", "how speed/tflops is counted": TFLOPS_NOTE}
        self._curves.texts(texts, step)
        if self._tracker_sections:
            run_dir = RunDir(self._records_path.parent)
            self._trackers = Trackers(self._tracker_sections, run_dir, tell=self.say)
            self.write_record("run", status=TRACKED, step=step, key=self._trackers.key)

    def write_record(self, kind: str, **fields: Any) -> None:
        """Writes a record, on rank 0."""
        if self.records is not None:
            self.records.write(kind, **self._labels, **fields)

    def pause(self) -> AbstractContextManager[None]:
        """Leaves the time that is spent inside out of the time of training."""
        return self._speedometer.pause()

    def step(self, report: StepReport) -> None:
        """Shows and records a log interval."""
        seconds, speed = self._speedometer.read(report.interval)
        if not self._active:
            return
        shares = {name: value / seconds for name, value in report.interval.phases.items()}
        peak = peak_memory_gib(self._device)
        fields = {
            "step": report.step,
            "total": report.total,
            "terms": report.terms,
            "rho": report.rho,
            "losses": report.by_loss(),
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "loss_scale": report.loss_scale,
            "skipped_steps": report.skipped_steps,
            "tokens": int(report.interval.counts.tokens),
            "seconds": seconds,
            "time_share": shares,
            "peak_memory_gib": peak,
            **speed,
        }
        self.history.add(fields)
        self.write_record("step", **fields)
        self._plot(report, speed, shares, peak)
        self._progress.step(report, speed["tokens_per_s"])

    def _plot(self, report: StepReport, speed: dict[str, float], shares: dict[str, float], peak: float) -> None:
        losses = report.by_loss()
        points = {"loss/total": report.total, "optimizer/lr": report.lr, "memory/peak_gib": peak}
        points |= {f"loss/{name}": value for name, value in losses.items()}
        points |= {f"pair/{name}": value for name, value in report.terms.items()}
        points |= {f"rho/{pair}": value for pair, value in report.rho.items()}
        points |= {f"share/{name}": value / report.total for name, value in losses.items() if report.total}
        points |= {f"speed/{name}": value for name, value in speed.items()}
        points |= {f"time_share/{name}": value for name, value in shares.items()}
        points["optimizer/skipped_steps"] = report.skipped_steps
        if report.grad_norm is not None:
            points["optimizer/grad_norm"] = report.grad_norm
        if report.loss_scale is not None:
            points["optimizer/loss_scale"] = report.loss_scale
        self._show("total", points, report.step)

    def _show(self, kind: str, points: dict[str, float], step: int) -> None:
        """Writes points for TensorBoard, and sends them to the trackers after their record (Trackers.send)."""
        curves = self._held_out_curves if kind == "held_out" else self._curves
        if curves is not None:
            curves.scalars(points, step)
        if self._trackers is not None:
            prefix = f"{HELD_OUT}/" if kind == "held_out" else ""
            self._trackers.send(kind, {prefix + tag: value for tag, value in points.items()}, step)

    def say(self, text: str) -> None:
        """Prints a line, on rank 0."""
        if self._active:
            self._progress.say(text)

    def held_out(self, step: int, total: float, terms: dict[str, float]) -> None:
        """Shows and records held-out losses after `step`."""
        self.history.add({"step": step, "held_out": {"total": total, "terms": terms}})
        self.write_record("step", step=step, held_out={"total": total, "terms": terms})
        points = {f"pair/{name}": value for name, value in terms.items()}
        self._show("held_out", {"loss/total": total, **points}, step)
        self.say(f"step {step}/{self._progress.steps}  held-out loss {total:.4g}")

    def vectors(self, step: int, student: dict[str, float], teacher: dict[str, float]) -> None:
        """Shows and records, after `step`, how alike the vectors of held-out texts are."""
        self.write_record("step", step=step, vectors={"student": student, "teacher": teacher})
        sides = {"student": student, "teacher": teacher}
        points = {f"vectors/{name}_{side}": value for side, room in sides.items() for name, value in room.items()}
        self._show("held_out", points, step)
        self.say(
            f"step {step}/{self._progress.steps}  vectors of texts: mean cosine {student['cosine']:.3f} (teacher "
            f"{teacher['cosine']:.3f}), effective rank {student['rank']:.0f} ({teacher['rank']:.0f})"
        )

    def scores(self, step: int, scores: dict[str, float], *, aloud: bool = True, **fields: Any) -> None:
        """Records task scores after `step`, and prints them when `aloud`."""
        self.write_record("step", step=step, scores=scores, **fields)
        self._show("scores", {f"score/{name}": value for name, value in scores.items()}, step)
        if aloud:
            listed = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self.say(f"step {step}/{self._progress.steps}  {listed}")

    def checkpoint(self, step: int, folder: Path) -> None:
        """Shows and records that a checkpoint is complete."""
        self.write_record("checkpoint", step=step, path=str(folder))
        self.say(f"step {step}/{self._progress.steps}  checkpoint {folder}")

    def report(self, failure: Failure) -> None:
        """Records and says what went wrong."""
        self.write_record("error", **failure.fields)
        if failure.text:
            self.say(failure.text)

    def record_from_any_rank(self, failure: Failure) -> None:
        """Records what ends this rank. Rank 0 owns the stream of records; another rank appends to the same file."""
        if self.records is not None:
            self.write_record("error", **failure.fields)
            return
        with contextlib.suppress(OSError):  # stderr says it too
            self._records_path.parent.mkdir(parents=True, exist_ok=True)  # on a disk of this host's own
            records = open_records(self._records_path)
            records.write("error", **self._labels, **failure.fields)
            records.close()

    def write_hparams(self, values: Mapping[str, float | str], metrics: Mapping[str, float]) -> None:
        """Writes the row of a run that has ended on TensorBoard's HPARAMS page, on rank 0 (hparams.write_hparams)."""
        write_hparams(self._tensorboard_dir, values, metrics, tell=self.say)

    def end_progress(self) -> None:
        """Leaves the bar where it is; further lines come under it."""
        self._progress.end()

    def close(self) -> None:
        """Closes the files. Raises RunFailure when a result could not be recorded."""
        self.end_progress()
        for curves in (self._curves, self._held_out_curves, self._trackers):
            if curves is not None:
                curves.close()
        if self.records is not None:
            self.records.close()


class _Silent:
    """A stream that shows nothing: a terminal is for the eyes."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None
