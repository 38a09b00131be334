"""What a user sees of a run: progress, records, TensorBoard. Rank 0 shows it; other ranks keep silent."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.ranks import watchdog
from engine.records.events import EventFile
from engine.records.history import History
from engine.records.records import RecordWriter
from engine.records.run_dir import RunDir
from engine.train.loss_window import BadMicroStep
from engine.train.step_report import StepReport

TFLOPS_NOTE = (
    "Achieved TFLOP/s of all ranks: real tokens per second times the FLOPs of a token: the teacher's forward plus "
    "three times the forward of student and projections (a backward pass costs twice its forward; recomputation by "
    "activation checkpointing is not counted). A forward counts 2 FLOPs for each weight of a linear layer, and "
    "4 x sequence length x width for attention in each layer. Losses, norms, look-ups and the optimizer are left out."
)
MOST_SEQUENCES = 1024
"""Of a micro batch that are named in an error record."""
ETA_AFTER_STEPS = 20
"""The first steps allocate, compile and warm caches; the time left is estimated without them."""


def peak_memory_gib(device: torch.device) -> float:
    """Peak of this rank: device memory on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def open_records(path: Path, *, echo: bool = True, tell: Callable[[str], None] | None = None) -> RecordWriter:
    """On a terminal the bar is for the eyes, and records.jsonl holds the lines; logs and pipes get both (`echo`)."""
    return RecordWriter(path, stream=None if echo and not sys.stdout.isatty() else _Silent(), tell=tell)


class Monitor:
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
        labels: dict[str, Any] | None = None,
        part_of_a_job: bool = False,
        name: str = "",
    ) -> None:
        """labels: fields that every record gets, e.g. which of several models it is about. part_of_a_job: the records
        go to the file alone, since stdout is the job's. name: of the model, where lines of several are mixed; they then
        have no bar."""
        self._active = active
        self._name = name
        self._labels = labels or {}
        self._steps = steps
        self._flops_per_token = flops_per_token
        self._device = device
        self._config_text = config_text
        self._tensorboard_dir = tensorboard
        self._curves: EventFile | None = None
        self._bar: tqdm[Any] | None = None
        self._on_terminal = sys.stderr.isatty()
        self.records = open_records(records, echo=not part_of_a_job, tell=self.say) if active else None
        self.history = History()
        self._records_path = records
        self._wait_s = 0.0

    @classmethod
    def silent(cls, run_dir: RunDir, *, steps: int, device: torch.device) -> Monitor:
        """For work within a job that shows nothing of it, but for what ends the job: that is recorded on every rank."""
        return cls(
            active=False,
            tensorboard=run_dir.tensorboard,
            records=run_dir.records,
            steps=steps,
            flops_per_token=0.0,
            device=device,
            config_text="",
        )

    def hangs_watched(
        self, name: str, *, step: Callable[[], int], rank: int, limit_s: float
    ) -> AbstractContextManager[None]:
        """A rank that hangs inside is ended (engine/ranks/watchdog.py), with a record and its stacks in hangs/.
        name: of that file's beginning. step: the one that was begun last."""
        host = platform.node()
        stacks = self._records_path.parent / "hangs" / f"{name}-{host}-rank-{rank:05d}.txt"
        return watchdog.armed(limit_s, stacks, lambda: self._hang(step(), limit_s, rank=rank, host=host, stacks=stacks))

    def begin(self, step: int) -> None:
        self._start_step = step
        self._mark = time.perf_counter()
        self._eta_mark = (step, self._mark)
        if not self._active:
            return
        self.history = History.read(self._records_path, until=step)
        # a resumed run overwrites the points that a killed one wrote past its last checkpoint
        self._curves = EventFile(self._tensorboard_dir, purge_step=step + 1 if step else None, tell=self.say)
        texts = {"config": f"```yaml\n{self._config_text}\n```", "how speed/tflops is counted": TFLOPS_NOTE}
        self._curves.texts(texts, step)
        if self._on_terminal and not self._name:
            self._bar = tqdm(total=self._steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def write_record(self, kind: str, **fields: Any) -> None:
        if self.records is not None:
            self.records.write(kind, **self._labels, **fields)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent here does not count as training time."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def step(self, report: StepReport) -> None:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        wait, self._wait_s = report.interval.wait_s - self._wait_s, report.interval.wait_s
        if not self._active:
            return
        speed = {
            "tokens_per_s": report.interval.counts.tokens / seconds,
            "samples_per_s": report.interval.counts.sequences / seconds,
            "tflops": self._flops_per_token * report.interval.counts.tokens / seconds / 1e12,
            "data_wait_share": wait / seconds,
            "fill": report.interval.counts.tokens / max(report.interval.counts.positions, 1.0),
        }
        shares = {name: value / seconds for name, value in report.interval.phases.items()}
        peak = peak_memory_gib(self._device)
        self._plot(report, speed, shares, peak)
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
        self._progress(report, speed["tokens_per_s"], now)

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
        self._scalars(points, report.step)

    def _scalars(self, points: dict[str, float], step: int) -> None:
        if self._curves is not None:
            self._curves.scalars(points, step)

    def _progress(self, report: StepReport, tokens_per_s: float, now: float) -> None:
        done = report.step - self._start_step
        left = ""
        if done >= ETA_AFTER_STEPS:
            per_step = (now - self._eta_mark[1]) / (report.step - self._eta_mark[0])
            left = f", {format_seconds(per_step * (self._steps - report.step))} left"
        elif done <= ETA_AFTER_STEPS // 2:
            self._eta_mark = (report.step, now)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {report.total:.4g}, {tokens_per_s:,.0f} tok/s{left}", refresh=False)
            self._bar.update(report.step - self._bar.n)
            return
        parts = ", ".join(f"{name} {value:.4g}" for name, value in report.by_loss().items())
        self.say(
            f"step {report.step}/{self._steps}  loss {report.total:.4g} ({parts})  lr {report.lr:.2e}  "
            f"{tokens_per_s:,.0f} tokens/s{left}"
        )

    def say(self, text: str) -> None:
        if not self._active:
            return
        text = f"{self._name}  {text}" if self._name else text
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def held_out(self, step: int, total: float, terms: dict[str, float]) -> None:
        self.history.add({"step": step, "held_out": {"total": total, "terms": terms}})
        points = {"total": total, **terms}
        self._scalars({f"loss_held_out/{name}": value for name, value in points.items()}, step)
        self.write_record("step", step=step, held_out={"total": total, "terms": terms})
        self.say(f"step {step}/{self._steps}  held-out loss {total:.4g}")

    def scores(self, step: int, scores: dict[str, float], *, aloud: bool = True, **fields: Any) -> None:
        """Task scores after `step`; also as a line of text when `aloud`."""
        self._scalars({f"score/{name}": value for name, value in scores.items()}, step)
        self.write_record("step", step=step, scores=scores, **fields)
        if aloud:
            listed = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self.say(f"step {step}/{self._steps}  {listed}")

    def checkpoint(self, step: int, folder: Path) -> None:
        self.write_record("checkpoint", step=step, path=str(folder))
        self.say(f"step {step}/{self._steps}  checkpoint {folder}")

    def not_finite(
        self,
        report: StepReport,
        *,
        terms: list[str],
        first: BadMicroStep,
        sequences: list[int],
        bad_steps: list[int],
        skipped: int | None,
        may_skip: int,
    ) -> None:
        """Losses were not finite in `bad_steps`. skipped: how many steps this start has left out for that; None when it
        ends here. `terms`, `sequences`: of the first micro step of them, by name and by number in the corpus."""
        steps = f"step {first.step}" if len(bad_steps) == 1 else f"{len(bad_steps)} steps from {first.step} on"
        what = f"the loss is not finite in {steps} ({_in_micro_step(terms, first, sequences)})"
        fields: dict[str, Any] = {
            "step": first.step,
            "terms": terms,
            "rank": first.rank,
            "micro": first.micro,
            "sequences": sequences[:MOST_SEQUENCES],
            "bad_steps": bad_steps,
            "lr": report.lr,
            "total": report.total,
        }
        if skipped is None:
            limit = f"; more than train.skip_bad_steps={may_skip} of them" if may_skip else ""
            more = ", or train.skip_bad_steps when single batches are to blame"
            self._say_diverged(what + limit, more, **fields)
            return
        self.write_record("error", status="skipped", skipped=skipped, **fields)
        self.say(f"warning: {what}; left out ({skipped} of at most {may_skip})")

    def diverged_weights(self, step: int) -> None:
        self._say_diverged(f"weights are not finite after step {step}", step=step, terms=["weights"])

    def diverged_scale(self, step: int, terms: list[str], first: BadMicroStep | None, sequences: list[int]) -> None:
        """first: the first micro step whose loss was not finite, with its terms and sequences; None where the losses
        were, and gradients alone overflowed."""
        where, facts = "", {}
        if first is not None:
            where = f" ({_in_micro_step(terms, first, sequences)})"
            facts = {"rank": first.rank, "micro": first.micro, "sequences": sequences[:MOST_SEQUENCES]}
        what = f"gradients overflow fp16 at the smallest loss scale in step {step}{where}"
        self._say_diverged(what, "; bf16 has a wider range", step=step, terms=terms, **facts)

    def _say_diverged(self, what: str, more: str = "", **fields: Any) -> None:
        self.write_record("error", status="diverged", **fields)
        self.say(
            f"error: {what}. Complete checkpoints, if any, are untouched. Try a lower learning rate or more warm-up in "
            f"another output_dir{more}"
        )

    def checkpoint_failed(self, step: int, why: str, *, goes_on: bool) -> None:
        """goes_on: training continues without this checkpoint."""
        self.write_record("error", status="checkpoint_failed", step=step, why=why, goes_on=goes_on)
        if goes_on:
            self.say(f"warning: {why}; training goes on, and the next checkpoint is tried as usual")

    def out_of_memory(self, step: int, *, rank: int, why: str, **facts: Any) -> None:
        """On the rank that has run out of it. facts: of the micro step, when it was in one."""
        self._write_from_any_rank("error", status="out_of_memory", step=step, rank=rank, why=why, **facts)

    def _hang(self, step: int, limit_s: float, *, rank: int, host: str, stacks: Path) -> None:
        """On the watchdog's thread, just before the process ends."""
        print(
            f"error: rank {rank} on {host} has finished nothing for {limit_s:g} s after step {step} "
            f"(train.hang_timeout_s); its stacks are in {stacks}",
            file=sys.stderr,
            flush=True,
        )
        self._write_from_any_rank(
            "error", status="hang", step=step, rank=rank, host=host, limit_s=limit_s, stacks=str(stacks)
        )

    def _write_from_any_rank(self, kind: str, **fields: Any) -> None:
        """Rank 0 owns the stream of records; what another rank says before its end is appended to the same file."""
        if self.records is not None:
            self.write_record(kind, **fields)
            return
        with contextlib.suppress(OSError):  # what it has to say is on stderr too
            self._records_path.parent.mkdir(parents=True, exist_ok=True)  # on a disk of this host's own
            records = open_records(self._records_path)
            records.write(kind, **self._labels, **fields)
            records.close()

    def end_progress(self) -> None:
        """Leaves the bar where it is; what is said from now on comes under it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Raises RunFailure when a result could not be recorded."""
        self.end_progress()
        if self._curves is not None:
            self._curves.close()
        if self.records is not None:
            self.records.close()


def _in_micro_step(terms: list[str], at: BadMicroStep, sequences: list[int]) -> str:
    shown = f"{', '.join(map(str, sequences[:8]))}{' …' if len(sequences) > 8 else ''}"
    return f"terms: {', '.join(terms) or 'total only'}; rank {at.rank}, sequences {shown}"


class _Silent:
    """A stream that swallows: on a terminal, records go to the file only."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None
