"""A search while it runs: lines, a bar on a terminal, TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

from optuna import Study
from tqdm import tqdm

from engine.records.flock import Flock, no_locks_text, try_flock
from ga.config import SearchConfig
from ga.evolution.genome import Space
from ga.study.evaluations import RUNNING, Evaluation, rank_evaluations, read_history
from ga.view.board import SearchBoard
from ga.view.progress import Progress

TENSORBOARD, LEADER = "tensorboard", "leader.lock"


class LiveView:
    """What one driver shows. Of several drivers in one folder, the first one alone writes TensorBoard's files; when it
    has ended another one takes over."""

    def __init__(self, config: SearchConfig, space: Space, study: Study, *, tasks: Sequence[str]) -> None:
        self._config, self._space, self._study = config, space, study
        population = config.search.operators.population
        self._progress = Progress(space, trials=config.search.trials, population=population, say=self.say)
        self._population, self._tasks = population, tasks
        self._lock: IO[str] | None = None
        self._board: SearchBoard | None = None
        self._bar: Any = None

    def __enter__(self) -> LiveView:
        self._lock = (self._config.root / LEADER).open("w")
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._config.search.trials, unit="genome", dynamic_ncols=True, file=sys.stderr)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.close()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def update(self, *, over: bool = False) -> list[Evaluation]:
        """Looks at the study, shows it and returns it."""
        evaluations = read_history(self._study)
        self._progress.update(evaluations, over=over)
        running = {one.job for one in evaluations if one.outcome == RUNNING and one.job}
        if self._leads():
            assert self._board is not None
            self._board.refresh(evaluations, running_jobs=len(running), population=self._population)
        if self._bar is not None:
            best = rank_evaluations(evaluations)
            self._bar.n = sum(one.counts and one.outcome != RUNNING for one in evaluations)
            at_best = f", best {best[0].fitness:.4f} ({best[0].genome})" if best else ""
            self._bar.set_postfix_str(f"{len(running)} jobs{at_best}")
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
                        self._config.root, f"nothing keeps a second writer of {TENSORBOARD} out: start no other one"
                    )
                )
            self._board = SearchBoard(
                self._config.root / TENSORBOARD,
                self._space,
                tasks=self._tasks,
                say=self.say,
            )
        return True
