"""TensorBoard files of a search, written with tensorboard's own classes: no torch, no TensorFlow."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ga.evolution.operators import diversity
from ga.study.evaluations import RUNNING, Evaluation, ranked
from ga.view.progress import Block, blocks, genes_of

KIND = api_pb2.DATASET_VALIDATION
SEARCH, TRIALS = "search", "trials"
"""Runs: the whole search, and one for each trial."""
FITNESS = "fitness"
METRICS = "trial/"
"""Group of the trials' metrics: below `search/` on the page, not above it."""


class EventFile:
    """One run; makes its folder."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def scalar(self, tag: str, value: float, step: int, *, wall_time: float | None = None) -> None:
        self._add(summary_pb2.Summary.Value(tag=tag, simple_value=value), step, wall_time)

    def hparams(self, tag: str, data: Any, *, wall_time: float | None = None) -> None:
        """One of the hparams plugin's messages."""
        value = summary_pb2.Summary.Value(
            tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR
        )
        self._add(value, 0, wall_time)

    def _add(self, value: Any, step: int, wall_time: float | None) -> None:
        summary = summary_pb2.Summary(value=[value])
        when = time.time() if wall_time is None else wall_time
        self._writer.add_event(event_pb2.Event(wall_time=when, step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def write_experiment(file: EventFile, hparams: Mapping[str, Sequence[int] | None], metrics: Sequence[str]) -> None:
    """What the HPARAMS page shows. hparams: name -> least and largest value, or None for texts."""
    infos = []
    for name, limits in hparams.items():
        if limits is None:
            infos.append(api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_STRING))
        else:
            domain = api_pb2.Interval(min_value=min(limits), max_value=max(limits))
            infos.append(api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_FLOAT64, domain_interval=domain))
    shown = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=METRICS + tag), display_name=tag, dataset_type=KIND)
        for tag in metrics
    ]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=shown, time_created_secs=time.time())
    file.hparams(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment))


def write_trial(folder: Path, hparams: Mapping[str, int | str], metrics: Mapping[str, float], *, ended: float) -> None:
    """A run of one trial: its hparams, and its metrics as scalars; none: it has failed. ended: seconds since 1970."""
    start = plugin_data_pb2.SessionStartInfo(group_name=folder.name, start_time_secs=ended)
    for name, value in hparams.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    status = api_pb2.STATUS_SUCCESS if metrics else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=ended)
    with EventFile(folder) as file:
        data = plugin_data_pb2.HParamsPluginData
        file.hparams(metadata.SESSION_START_INFO_TAG, data(session_start_info=start), wall_time=ended)
        for tag, number in metrics.items():
            file.scalar(METRICS + tag, number, 0, wall_time=ended)
        file.hparams(metadata.SESSION_END_INFO_TAG, data(session_end_info=end), wall_time=ended)


class SearchBoard:
    """The curves of a search against the number of finished evaluations, and its trials under HPARAMS.

    All of it is made anew from the history when it is opened, so that a continued search has whole curves.
    """

    def __init__(self, folder: Path, gene_names: Sequence[str], *, teacher_layers: int, tasks: Sequence[str]) -> None:
        """gene_names: of the genes of a genome, in order."""
        for name in (SEARCH, TRIALS):
            shutil.rmtree(folder / name, ignore_errors=True)
        self._folder, self._names, self._tasks = folder, tuple(gene_names), tuple(tasks)
        self._file = EventFile(folder / SEARCH)
        shown: dict[str, Sequence[int] | None] = dict.fromkeys(gene_names, (0, teacher_layers))
        write_experiment(self._file, {"genome": None, **shown}, [FITNESS, *tasks])
        self._seen: list[int] = []
        """Numbers of the trials that are written, in order."""
        self._blocks: set[str] = set()
        self._last: Block | None = None
        """Without a point, but it has one if nothing more comes."""
        self._jobs: int | None = None

    def refresh(self, evaluations: Sequence[Evaluation], *, running_jobs: int, population: int) -> None:
        """Adds what is new."""
        finished = {one.number: one for one in evaluations if one.counts and one.outcome != RUNNING}
        new = sorted((one for one in finished.values() if one.number not in self._seen), key=_when)
        for one in new:
            self._seen.append(one.number)
            self._add(one, [finished[number] for number in self._seen if number in finished])
        # in the order in which they ended: TensorBoard drops points when steps go back
        every = blocks([finished[number] for number in self._seen if number in finished], population)
        for block in every:
            if block is not every[-1] or _is_whole(block, evaluations, population):
                self._add_block(block)
        busy = any(one.counts and one.outcome == RUNNING for one in evaluations)
        self._last = every[-1] if every and not busy else None
        if running_jobs != self._jobs:
            self._jobs = running_jobs
            self._file.scalar("search/jobs_running", running_jobs, len(self._seen))
        self._file.flush()

    def _add(self, one: Evaluation, spent: Sequence[Evaluation]) -> None:
        step, when = len(spent), _when(one)
        best = ranked(spent)
        if best:
            self._file.scalar("search/best", float(best[0].fitness or 0.0), step, wall_time=when)
        if one.fitness is not None:
            self._file.scalar("search/fitness", one.fitness, step, wall_time=when)
        if one.seconds:
            self._file.scalar("search/seconds_per_evaluation", one.seconds, step, wall_time=when)
        without = sum(other.fitness is None for other in spent)
        self._file.scalar("search/without_fitness", without, step, wall_time=when)
        if not one.genome:  # ended from outside before it was described
            return
        hparams: dict[str, int | str] = {"genome": one.genome}
        hparams |= dict(zip(self._names, genes_of([one], length=len(self._names))[0], strict=True))
        metrics = {} if one.fitness is None else {FITNESS: one.fitness, **one.scores}
        write_trial(self._folder / TRIALS / f"{one.number:05d}", hparams, metrics, ended=when)

    def _add_block(self, block: Block) -> None:
        """Once."""
        if block.name in self._blocks:
            return
        self._blocks.add(block.name)
        group = block.evaluations
        step = max(self._seen.index(one.number) for one in group) + 1
        when = max(map(_when, group))
        fitness = [one.fitness for one in group if one.fitness is not None]
        if fitness:
            self._file.scalar("search/mean", sum(fitness) / len(fitness), step, wall_time=when)
        self._file.scalar("search/diversity", diversity(genes_of(group, length=len(self._names))), step, wall_time=when)

    def close(self) -> None:
        """Ends the files. The last generation has its point then, though it may be a small one."""
        if self._last is not None:
            self._add_block(self._last)
        self._file.close()


def _is_whole(block: Block, evaluations: Sequence[Evaluation], population: int) -> bool:
    """Whether a block of finished evaluations gets no more of them."""
    generation = block.evaluations[0].generation
    if (
        generation != 0 and len(block.evaluations) >= population
    ):  # generation 0 is larger when there are many heuristics
        return True
    # children are asked for when all parents have ended
    return generation is not None and any((one.generation or 0) > generation for one in evaluations)


def _when(one: Evaluation) -> float:
    """Seconds since 1970."""
    return 0.0 if one.finished is None else one.finished.timestamp()
