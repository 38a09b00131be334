"""The job of launch/measure.py: which encoders, for how long, and the table."""

from __future__ import annotations

from pathlib import Path

from engine.config.distill import RunConfig
from engine.config.reading import parse_config
from engine.config.tools import MeasureConfig
from engine.data.manifest import MANIFEST, load_manifest
from engine.errors import UserError
from engine.hub.files import allow_pickle
from engine.jobs.execution import compute_device
from engine.jobs.measure.encoders import compare_encoders
from engine.models.fit import longest_input
from engine.models.hub import SavedModel
from engine.records.columns import columns
from engine.records.comparison import Comparison
from engine.records.run_dir import RunDir
from engine.tasks.model import model_folder

USUAL_LENGTH = 128
"""Tokens of a sequence where nothing else is known."""


def measure(config: MeasureConfig) -> Comparison:
    """Measures the encoders and prints the table. Raises UserError for a model that cannot be read, and a length that
    one of them does not take."""
    allow_pickle(config.allow_pickle)
    run = distillation_of(config.models[0]) if len(config.models) == 1 else None
    models = {path: SavedModel.read("models", model_folder(path, key="models")) for path in config.models}
    if run is not None:
        teacher = SavedModel.read(f"teacher.path of {config.models[0]}", run.teacher.path)
        models = {run.teacher.path: teacher, **models}
    compared = compare_encoders(
        models,
        device=compute_device(),
        seq_len=_length(config.seq_len, models, run),
        batch_sizes=config.batch_sizes,
        dtype=config.dtype,
        rounds=config.rounds,
        with_onnx=True,
    )
    print(f"{columns(compared.rows())}\n\n{compared.conditions}", flush=True)
    return compared


def distillation_of(path: str) -> RunConfig | None:
    """Returns the configuration of the distillation that has made a student, which is named by its run directory or by
    the folder inside; None for other models."""
    for run_dir in (RunDir(Path(path)), RunDir(Path(path).resolve().parent)):
        is_named = Path(path).resolve() in (run_dir.root.resolve(), run_dir.student.resolve())
        if is_named and run_dir.student.is_dir() and run_dir.config.is_file():
            return parse_config(RunConfig, ["--config", str(run_dir.config)], "")
    return None


def _length(wanted: int | None, models: dict[str, SavedModel], run: RunConfig | None) -> int:
    """Returns the tokens of a sequence: as many as wanted, as the corpus of a run has, or USUAL_LENGTH, at most what
    all models take."""
    limits = {path: limit for path, saved in models.items() if (limit := longest_input(saved.config)) is not None}
    least = min(limits, key=limits.__getitem__, default=None)
    if wanted is not None:
        if least is not None and limits[least] < wanted:
            raise UserError(f"seq_len={wanted}: {least} takes at most {limits[least]} tokens; set a smaller seq_len")
        return wanted
    usual = USUAL_LENGTH
    if run is not None and (Path(run.data.path) / MANIFEST).is_file():
        usual = load_manifest(run.data.path).seq_len
    return usual if least is None else min(usual, limits[least])
