"""From a sharded checkpoint to a Hugging Face folder, without the training world: no ranks, no teacher, no corpus."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from engine.checkpoint import EXPORT_FILE
from engine.config import ExportConfig
from engine.errors import UserError
from engine.models.hub import init_arguments, model_class, quiet
from engine.run_dir import COMPLETE, RunDir

CARD_TAG = "- mapdistill"
PROJECTIONS_FILE = "projections.safetensors"
"""Beside the student: the training-only linear maps to the teacher's width, for those who want to go on."""


def export_run(config: ExportConfig) -> Path:
    """Writes the student of a complete checkpoint. Raises UserError when there is none."""
    run_dir = RunDir(Path(config.run))
    tags = run_dir.complete_tags()
    if not tags:
        raise UserError(f"run={config.run!r}: no complete checkpoint under {run_dir.checkpoints}")
    tag = tags[-1] if config.tag == "newest" else config.tag
    if tag not in tags:
        raise UserError(f"tag={config.tag!r}: no complete checkpoint of that name; complete ones: {', '.join(tags)}")
    target = Path(config.to).resolve() if config.to is not None else run_dir.student
    if target.exists() and not target.is_dir():
        raise UserError(f"to={config.to!r} is a file; name a folder")
    if target.exists() and any(target.iterdir()) and not _is_export(target):
        raise UserError(
            f"to={config.to!r} holds files that are not an export of mapdistill; name an empty or new folder"
        )
    export_checkpoint(run_dir, tag, target)
    print(f"student of {tag} written to {target}; load it with AutoModel.from_pretrained({str(target)!r})")
    return target


def _is_export(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and CARD_TAG in card.read_text(encoding="utf-8", errors="replace")


def export_checkpoint(run_dir: RunDir, tag: str, target: Path) -> None:
    """Writes into a sibling folder first and renames it, so that `target` is never half written."""
    description = json.loads((run_dir.checkpoints / tag / EXPORT_FILE).read_text(encoding="utf-8"))
    state = load_full_state(run_dir.checkpoints, tag)
    student, projections = split_state(state)
    model = rebuild_student(description, student)
    pending = target.with_name(target.name + ".part")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    with quiet():
        model.save_pretrained(pending)
    if projections:
        save_file(projections, pending / PROJECTIONS_FILE)
    if run_dir.tokenizer.is_dir():
        shutil.copytree(run_dir.tokenizer, pending, dirs_exist_ok=True)
    (pending / "README.md").write_text(model_card(description), encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    pending.rename(target)


def load_full_state(checkpoints: Path, tag: str) -> dict[str, torch.Tensor]:
    """The whole module in fp32: consolidated from the ZeRO shards' master weights, or, for stage 0, the weights as
    the module had them (16-bit ones are widened)."""
    marker = json.loads((checkpoints / tag / COMPLETE).read_text(encoding="utf-8"))
    if marker["zero_stage"] == 0:
        # our own file, written by DeepSpeed as a pickle with optimizer objects: weights_only cannot read it
        saved = torch.load(checkpoints / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in saved["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def split_state(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(student weights, projection weights), without their prefixes."""
    parts: dict[str, dict[str, torch.Tensor]] = {"student": {}, "projections": {}}
    for name, tensor in state.items():
        owner, _, rest = name.partition(".")
        parts[owner][rest] = tensor
    return parts["student"], parts["projections"]


def rebuild_student(description: dict[str, Any], weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The student in fp32 with exactly these weights. Raises RuntimeError when one is missing or left over."""
    settings = dict(description["student_config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = model_class(config, description["head"])(config, **init_arguments(config, description["head"]))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise RuntimeError(f"checkpoint and student differ: missing {missing}, unexpected {unexpected}")
    return model.eval()


def model_card(description: dict[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in description["card"].items())
    return (
        f"---\nlibrary_name: transformers\ntags:\n- knowledge-distillation\n{CARD_TAG}\n---\n\n"
        "# Distilled student\n\nTrained with mapdistill (layer-mapped distillation on DeepSpeed). Numbers are of the "
        "distillation itself; the model has not been scored on any task.\n\n"
        f"| | |\n| --- | --- |\n| optimizer step | {description['step']} |\n{rows}\n\n"
        f"`{PROJECTIONS_FILE}` holds the training-only projections to the teacher's width; the model does not need "
        "it.\n"
    )
