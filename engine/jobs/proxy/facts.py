"""What a search must know of its proxy before it starts: sizes, tasks, and hashes of all that a fitness depends on but
for the machine. Read from files in a second or two; no torch here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from engine import __version__
from engine.config.marks import Mark, settings
from engine.config.places import ROOT
from engine.config.proxy import ProxyJobConfig
from engine.data.manifest import corpus_hash, load_manifest
from engine.hub.files import allow_pickle, find_file, read_json, weights_fingerprint
from engine.hub.sentence import encoder_folder, read_sentence_encoder
from engine.ranks.hosts.agent import COMPARED, code_hash
from engine.records.fingerprints import digest
from engine.tasks.load import load_task, resolve_names

CONFIG = "config.json"
PACKAGES = (*COMPARED, "torchmetrics")
LAYERS = ("num_hidden_layers", "n_layers")
"""Names of the number of layers in a config.json; the second is DistilBERT's."""


@dataclass(frozen=True)
class ProxyFacts:
    student_layers: int
    teacher_layers: int
    sequences: int
    """Number of sequences of the corpus."""
    seq_len: int
    tasks: tuple[str, ...]
    """Names of the tasks that make the fitness."""
    fingerprint: str
    """Hash of fingerprint_parts. Jobs have one of their own, of the precision of their machine too."""
    fingerprint_parts: dict[str, Any]


def read_facts(config: ProxyJobConfig) -> ProxyFacts:
    """Reads config.json, weights (some blocks), manifest.json and task rows. Raises UserError; what else does not fit,
    the first job finds."""
    allow_pickle(config.allow_pickle)
    teacher = encoder_folder(config.teacher.path, "teacher.path")
    teacher_layers, config_hash = _layers_and_hash(teacher, "teacher.path")
    parts = given_parts(config)
    parts["teacher"]["config_sha256"] = config_hash
    parts["teacher"]["weights_sha256"] = weights_fingerprint(teacher, key="teacher.path")
    student_layers = config.student.layer_count(teacher_layers)
    if config.student.path is not None:
        student = encoder_folder(config.student.path, "student.path")
        student_layers, parts["student"]["config_sha256"] = _layers_and_hash(student, "student.path")
    manifest = load_manifest(config.data.path)
    parts["data"] |= {"content_sha256": corpus_hash(manifest), "seq_len": manifest.seq_len}
    tasks = [load_task(name, config.task) for name in resolve_names(config.proxy.tasks, config.task)[0]]
    parts["tasks"] = {task.spec.name: {"sha256": task.sha256, "metrics": list(task.spec.metrics)} for task in tasks}
    return ProxyFacts(
        student_layers=student_layers,
        teacher_layers=teacher_layers,
        sequences=manifest.sequences,
        seq_len=manifest.seq_len,
        tasks=tuple(parts["tasks"]),
        fingerprint=digest(parts),
        fingerprint_parts=parts,
    )


def given_parts(config: ProxyJobConfig) -> dict[str, Any]:
    """Returns the settings that decide a fitness, by section, with how the teacher makes vectors, the weights of
    student.path and the versions of code and packages. Seed and mapping are left out: they tell evaluations of one
    fingerprint apart. So is what changes rounding only (ranks, micro batch, ZeRO stage, attention backend)."""
    fixed = settings(config, Mark.RESULT)
    for name in ("epochs", "lr", "batch") if config.proxy.evaluator == "probe" else ():
        del fixed[f"proxy.{name}"]
    parts: dict[str, Any] = {}
    for key, value in fixed.items():
        section, _, name = key.partition(".")
        parts.setdefault(section, {})[name] = value
    parts["teacher"]["vectors"] = vectors_of(config.teacher.path)
    if config.student.path is not None:
        student = encoder_folder(config.student.path, "student.path")
        parts["student"]["weights_sha256"] = weights_fingerprint(student, key="student.path")
    parts["code"] = {"mapdistill": code_version(), **{name: version(name) for name in PACKAGES}}
    return parts


def vectors_of(path: str) -> dict[str, Any]:
    """Returns all that decides how the states of a teacher become vectors, up to their length."""
    sentence, _ = read_sentence_encoder(path, "teacher.path")
    if sentence is None:
        return {"pooling": ["mean"], "dense": [], "lower_case": False, "prompts": {}, "default_prompt": None}
    dense = [(one.settings, one.weights.read_bytes()) for one in sentence.dense if one.weights is not None]
    return {
        "pooling": list(sentence.pooling),
        "dense": [[settings, hashlib.sha256(weights).hexdigest()] for settings, weights in dense],
        "lower_case": sentence.lower_case,
        "prompts": sentence.prompts,
        "default_prompt": sentence.default_prompt,
    }


@cache
def code_version() -> str:
    """Returns the version and a hash of this library's source: an edit may change what a fitness means."""
    return f"{__version__}+{code_hash(ROOT)}"


def _layers_and_hash(path: str, key: str) -> tuple[int, str]:
    """Returns the number of layers of a folder or hub model, and a hash of its config.json. A configuration that leaves
    the number to its class is read by transformers, which costs seconds."""
    file = find_file(path, CONFIG, key, what="configuration")
    values: dict[str, Any] = {} if file is None else read_json(file, key)
    layers = next((values[name] for name in LAYERS if isinstance(values.get(name), int)), None)
    inner = values.get("inner_group_num", 1)
    if layers is None:
        from engine.hub.config import load_config

        config = load_config(path, key)
        layers, inner = config.num_hidden_layers, getattr(config, "inner_group_num", 1)
    return layers * inner, digest(values)
