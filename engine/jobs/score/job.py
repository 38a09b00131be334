"""The job of launch/score.py: which encoders and tasks, the scores, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.config.tools import ScoreConfig
from engine.data.batch import Batch
from engine.errors import UserError
from engine.hub.files import allow_pickle
from engine.hub.sentence import read_sentence_encoder
from engine.jobs.execution import compute_device
from engine.jobs.measure.job import distillation_of
from engine.models.capture import inputs_of
from engine.models.fit import longest_input
from engine.models.hub import SavedModel, load_backbone
from engine.ranks.runtime import Runtime
from engine.records.columns import columns, labelled_lines
from engine.tasks.load import TaskData, load_task, resolve_names, seen_by_searches, take_rows
from engine.tasks.metrics import score_task
from engine.tasks.model import model_folder, task_tokenizer
from engine.tasks.probe import ProbeFeatures, probe_outputs
from engine.tasks.rows import Labels, Split
from engine.tasks.specs import TaskSpec, task_spec
from engine.tasks.texts import ScoredSplit, TaskTexts, TextFeatures, scored_split, zero_shot_metrics
from engine.tasks.vectors import TextVectors

Metrics = dict[str, float]
UNSEEN = "unseen half"


def score(config: ScoreConfig) -> dict[str, dict[str, Metrics]]:
    """Scores the encoders on the dev rows of the tasks, prints the table, and returns the metrics by model and task.

    A task with one split has a second entry, for the half of the rows that no search has seen. Raises UserError for
    models, tasks and rows that cannot be read, and for tasks of spans.
    """
    allow_pickle(config.allow_pickle)
    names, absent = resolve_names(config.tasks, config.task)
    for name in names:
        if task_spec(name, config.task).kind == "span":
            raise UserError(f"tasks={name!r}: finds answers in a text, which needs fine-tuning; leave it out")
    models = _folders(config.models)
    saved = {name: SavedModel.read("models", path) for name, path in models.items()}
    tasks = [load_task(name, config.task) for name in names]
    notes = [f"no folder of {', '.join(absent)} under {config.task.data_dir}: left out"] if absent else []
    notes += [text for task in tasks for text in task.warnings]
    found: dict[str, dict[str, Metrics]] = {}
    for name, path in models.items():
        sentence, why = read_sentence_encoder(path, "models")
        notes += [f"{name}: {why}; its vectors are means of its last hidden states"] if why else []
        found[name] = _scores(saved[name], TextVectors(sentence), tasks, config.seq_len)
    if notes:
        print(labelled_lines([("warnings", notes)]) + "\n")
    print(columns(_rows(found)), flush=True)
    return found


def _folders(paths: Sequence[str]) -> dict[str, str]:
    """Returns the folder or hub name of each model, and of a single student's teacher before it."""
    models = {path: model_folder(path, key="models") for path in paths}
    run = distillation_of(paths[0]) if len(paths) == 1 else None
    return models if run is None else {run.teacher.path: run.teacher.path, **models}


def _scores(
    saved: SavedModel, vectors: TextVectors, tasks: Sequence[TaskData], seq_len: int | None
) -> dict[str, Metrics]:
    tokenizer, _ = task_tokenizer(saved.path, saved.key, saved.config)
    wanted = (
        [vectors.max_seq_length, max(task.spec.defaults.seq_len for task in tasks)] if seq_len is None else [seq_len]
    )
    lengths = [length for length in (*wanted, longest_input(saved.config)) if length is not None]
    texts = TaskTexts(_splits(tasks), tokenizer, vectors, seq_len=min(lengths))
    device = compute_device()
    model = load_backbone(saved.path, key=saved.key, config=saved.config).eval().to(device)
    runtime = Runtime(0, 1, 0, 1, device, torch.get_num_threads())

    features = texts.features(partial(_hidden, model), saved.config.num_hidden_layers, runtime)
    found: dict[str, Metrics] = {}
    for task in tasks:
        found[task.spec.name] = _probed(task, features)
        if task.has_one_split:
            found[f"{task.spec.name}, {UNSEEN}"] = _unseen(task, features)
    return found


def _splits(tasks: Sequence[TaskData]) -> dict[str, tuple[TaskSpec, ScoredSplit]]:
    """Returns the splits that are read, by task and split: training rows are read for a probe alone."""
    splits = {}
    for task in tasks:
        for name in (*task.spec.dev_splits, *(() if task.spec.is_zero_shot else ("train",))):
            splits[f"{task.spec.name} {name}"] = (task.spec, scored_split(task, name))
    return splits


@torch.no_grad()
def _hidden(model: PreTrainedModel, batch: Batch, layers: frozenset[int]) -> tuple[torch.Tensor, ...]:
    output = model(**inputs_of(batch), output_hidden_states=True, return_dict=True)
    states = (*output.hidden_states[:-1], output.last_hidden_state)
    return tuple(states[layer] for layer in sorted(layers))


def _probed(task: TaskData, features: TextFeatures) -> Metrics:
    """Returns the metrics on the dev rows, means over their splits."""
    spec = task.spec
    dev = {name: features.part(f"{spec.name} {name}") for name in spec.dev_splits}
    if spec.is_zero_shot:
        [name] = dev
        return zero_shot_metrics(spec, scored_split(task, name), dev[name])
    train = scored_split(task, "train")
    assert isinstance(train, Split)
    outputs = probe_outputs(spec, features.part(f"{spec.name} train"), train.labels, dev)
    by_split = [score_task(spec, outputs[name], _labels(task, name)) for name in dev]
    return {metric: fmean(one[metric] for one in by_split) for metric in spec.metrics}


def _labels(task: TaskData, name: str) -> Labels:
    split = scored_split(task, name)
    assert isinstance(split, Split)
    assert split.labels is not None
    return split.labels


def _unseen(task: TaskData, features: TextFeatures) -> Metrics:
    """Returns the metrics of a zero-shot task on the rows of its only split that no fitness comes from."""
    split, whole = scored_split(task, "dev"), features.part(f"{task.spec.name} dev")
    rows = np.flatnonzero(~seen_by_searches(split))
    second = whole.second
    if isinstance(split, Split) and second is not None:
        second = second[rows]
    return zero_shot_metrics(task.spec, take_rows(split, rows), ProbeFeatures(whole.first[rows], second))


def _rows(found: Mapping[str, Mapping[str, Metrics]]) -> list[list[str]]:
    """Returns a table: a column for each model, a row for each metric; the others' shares of the first stand behind
    their values."""
    first, *others = found
    rows = [["", *found]]
    for task, metrics in found[first].items():
        for metric, value in metrics.items():
            shares = [_with_share(found[name][task][metric], value) for name in others]
            rows.append([f"{task}: {metric}", f"{value:.4f}", *shares])
    return rows


def _with_share(value: float, first: float) -> str:
    return f"{value:.4f}" + (f" ({value / first:.0%})" if first > 0 else "")
