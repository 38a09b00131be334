"""A search while it runs: lines, a bar on a terminal, TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any

from optuna import Study
from tqdm import tqdm

from engine.records.columns import counted
from engine.records.flock import Flock, no_locks_text, try_flock
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.study.evaluations import Evaluation, count_running_jobs, rank_evaluations, read_history, spent_evaluations
from ga.view.board import SearchBoard
from ga.view.progress import Pace, Progress

TENSORBOARD, LEADER = "tensorboard", "leader.lock"


class Stage:
    """A part of a search, from the evaluations that it begins with to the number that it needs: a bar on a
    terminal."""

    def __init__(self, study: Study, *, name: str, total: int) -> None:
        self.name, self.total = name, total
        self._study = study
        evaluations = read_history(study)
        self.pace = Pace(evaluations)
        self.done = len(spent_evaluations(evaluations))
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=self.done, desc=name, unit="genome", dynamic_ncols=True, file=sys.stderr
            )

    def refresh(self, *, with_best: bool = False) -> list[Evaluation]:
        """Reads the study, moves the bar, and returns the evaluations. with_best: the bar names the best genome."""
        evaluations = read_history(self._study)
        self.done = len(spent_evaluations(evaluations))
        if self._bar is not None:
            jobs = count_running_jobs(evaluations)
            best = rank_evaluations(evaluations) if with_best else []
            at_best = f", best {best[0].fitness:.4f} ({best[0].genome})" if best else ""
            # tqdm reckons the time left from what lies between these two
            self._bar.n, self._bar.initial = self.done, self.done - self.pace.paid(evaluations)
            self._bar.set_postfix_str(f"{counted(jobs, 'job')}{at_best}")
        return evaluations

    @property
    def has_bar(self) -> bool:
        """Whether standard error is a terminal."""
        return self._bar is not None

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class LiveView:
    """What one driver shows. Of several drivers in one folder, the first one alone writes TensorBoard's files; when it
    has ended another one takes over."""

    def __init__(self, config: SearchConfig, space: Space, study: Study, *, tasks: Sequence[str]) -> None:
        self._config, self._space, self._study = config, space, study
        self._population, self._tasks = config.search.operators.population, tasks
        self._lock: IO[str] | None = None
        self._board: SearchBoard | None = None
        self._stage: Stage | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> LiveView:
        self._lock = (self._config.root / LEADER).open("w")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def search_stage(self) -> Iterator[None]:
        """Shows the search itself while it is evaluated; call `update` often."""
        with self._shown(Stage(self._study, name="search", total=self._config.search.trials)) as stage:
            self._progress = Progress(
                self._space, stage.pace, trials=stage.total, population=self._population, say=self.say
            )
            yield

    @contextmanager
    def list_stage(self, study: Study, *, name: str) -> Iterator[None]:
        """Shows a list of evaluations, which `study` holds whole; call `count` often."""
        with self._shown(Stage(study, name=name, total=len(study.get_trials(deepcopy=False)))):
            yield

    @contextmanager
    def _shown(self, stage: Stage) -> Iterator[Stage]:
        self._stage = stage
        try:
            yield stage
        finally:
            stage.close()
            self._stage = None

    def say(self, text: str) -> None:
        if self._stage is not None:
            self._stage.say(text)
        else:
            print(text, flush=True)

    def count(self) -> None:
        """Shows how far the list is: without a terminal by a line after each job."""
        assert self._stage is not None
        stage, before = self._stage, self._stage.done
        evaluations = stage.refresh()
        if stage.done != before and not stage.has_bar:
            left = stage.pace.parts(evaluations, left=stage.total - stage.done)
            self.say("  ".join([f"{stage.name:<13}", f"{stage.done:>4} of {stage.total}", *left]))

    def update(self, *, over: bool = False) -> list[Evaluation]:
        """Looks at the search, shows it and returns it. over: no further evaluation will come."""
        assert self._stage is not None
        assert self._progress is not None
        evaluations = self._stage.refresh(with_best=True)
        self._progress.update(evaluations, over=over)
        if self._leads():
            assert self._board is not None
            jobs = count_running_jobs(evaluations)
            self._board.refresh(evaluations, running_jobs=jobs, population=self._population)
        return evaluations

    def _leads(self) -> bool:
        if self._board is None:
            assert self._lock is not None
            lock = try_flock(self._lock)
            if lock is Flock.HELD:
                return False
            if lock is Flock.MISSING:
                self.say(
                    no_locks_text(
                        self._config.root, f"a second writer of {TENSORBOARD} would not be noticed: do not start one"
                    )
                )
            self._board = SearchBoard(
                self._config.root / TENSORBOARD,
                self._space,
                tasks=self._tasks,
                say=self.say,
            )
        return True
