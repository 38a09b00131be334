"""Makes a Hugging Face folder of a sharded checkpoint, without the training world: no ranks, no teacher, no corpus."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from engine.config.tools import ExportConfig
from engine.errors import RunFailure, UserError, first_line
from engine.hub.files import quiet
from engine.hub.sentence import MODULES
from engine.hub.tokenizer import load_tokenizer
from engine.models.fit import CHECKS, EACH_AND_TOKENIZER, Parts, check_fit
from engine.models.hub import AUTO_CLASSES, SavedModel, init_arguments, model_class
from engine.models.projections import PROJECTIONS_FILE
from engine.records.comparison import Comparison
from engine.records.files import replaced, write_whole
from engine.records.history import History
from engine.records.run_dir import COMPLETE, RunDir
from engine.train.card import TUNED, is_card, last_comparison, model_card
from engine.train.checkpoint import EXPORT_FILE
from engine.train.checkpoint_files import is_sound, load_full_state, problems_of, read_marker
from engine.train.deepspeed_engine import full_state
from engine.train.onnx_file import ONNX_FILE, TOLERANCE, require_onnx, write_onnx
from engine.train.portable import make_portable, write_map
from engine.train.upload import describe_upload, require_token, upload

CARD = "README.md"


def export_run(config: ExportConfig) -> Path:
    """Writes the student of a complete checkpoint, and uploads it where that is asked for; returns its folder. Raises
    UserError when there is no such checkpoint, its files are damaged, the folder must not be replaced, its ONNX file
    cannot be written, or the hub does not take it."""
    if config.format == "onnx":
        require_onnx()
    if config.push_to_hub is not None and not config.dry_run:
        require_token(config.push_to_hub)
    run_dir = RunDir(Path(config.run))
    run_dir.require_no_patterns()
    tags = run_dir.complete_tags()
    if not tags:
        raise UserError(f"run={config.run!r}: no complete checkpoint under {run_dir.checkpoints}")
    tag = tags[-1] if config.tag == "newest" else config.tag
    if tag not in tags:
        raise UserError(f"tag={config.tag!r}: no complete checkpoint of that name; complete ones: {', '.join(tags)}")
    _check_files(run_dir, tag)
    description = _description(run_dir, tag)
    head = description["head"]
    usual = run_dir.model if head in TUNED else run_dir.student
    target = Path(config.output_dir).resolve() if config.output_dir is not None else usual
    if target.exists() and not target.is_dir():
        raise UserError(f"output_dir={config.output_dir!r} is a file; name a folder")
    if target.exists() and any(target.iterdir()) and not is_export(target):
        raise UserError(
            f"output_dir={config.output_dir!r} holds files that are not an export of mapdistill; name an empty or new "
            "folder"
        )
    _check_tokenizer(run_dir, config.run, description)
    place = ", in place of the earlier export" if is_export(target) else ""
    gap = export_checkpoint(run_dir, tag, target, with_onnx=config.format == "onnx")
    loader = AUTO_CLASSES[head][0].__name__
    print(f"model of {tag} written to {target}{place}; load it with {loader}.from_pretrained({str(target)!r})")
    if gap is not None:
        print(
            f"{target / ONNX_FILE}: its outputs differ from PyTorch's by at most {gap:.1e} (allowed: {TOLERANCE:.0e})"
        )
    if config.push_to_hub is not None:
        if config.dry_run:
            print(describe_upload(target, config.push_to_hub))
        else:
            print(f"uploaded to {upload(target, config.push_to_hub)}")
    return target


def _check_files(run_dir: RunDir, tag: str) -> None:
    """Raises UserError when a file of the checkpoint is not what its marker says, or lies on another host."""
    marker = read_marker(run_dir.checkpoints / tag / COMPLETE)
    folder = run_dir.checkpoints / tag
    problems = problems_of(folder, marker["files"]) if is_sound(marker) else [f"{COMPLETE} is unreadable"]
    if not problems:
        return
    shown = "; ".join(problems[:4])
    if is_sound(marker) and len(marker["ranks"]) < marker["world_size"] and not _lost_here(folder, marker):
        raise UserError(
            f"tag={tag!r}: holds the shards of {len(marker['ranks'])} of {marker['world_size']} ranks ({shown}); with "
            f"checkpoint.storage=local the others are on other hosts: copy them into {folder}, or use the student that "
            "the end of training exports"
        )
    raise UserError(f"tag={tag!r}: {shown}; name another checkpoint with --tag: {', '.join(run_dir.complete_tags())}")


def _check_tokenizer(run_dir: RunDir, run: str, description: dict[str, Any]) -> None:
    """Raises UserError when the run's tokenizer cannot be read, or is not the student's."""
    if not run_dir.tokenizer.is_dir():
        print(f"{run_dir.tokenizer} is not there: the exported folder has no tokenizer")
        return
    tokenizer = load_tokenizer(str(run_dir.tokenizer), "run")
    student = SavedModel("run", run, _student_config(description))
    check_fit(Parts(tokenizer, (student,)), [check for check in CHECKS if check.between == EACH_AND_TOKENIZER])


def _lost_here(folder: Path, marker: dict[str, Any]) -> list[str]:
    """Returns what is wrong with the files that this host wrote itself."""
    return problems_of(folder, {name: marker["files"][name] for name in marker["on_this_host"]})


def is_export(folder: Path) -> bool:
    """Returns whether a new export may replace the folder: it is an earlier one, and no clone of a repository that
    holds one."""
    card = folder / CARD
    is_tagged = card.is_file() and is_card(card.read_text(encoding="utf-8", errors="replace"))
    return is_tagged and not (folder / ".git").exists()


def _description(run_dir: RunDir, tag: str) -> dict[str, Any]:
    description: dict[str, Any] = json.loads((run_dir.checkpoints / tag / EXPORT_FILE).read_text(encoding="utf-8"))
    return description


def export_checkpoint(
    run_dir: RunDir, tag: str, target: Path, *, scores: dict[str, str] | None = None, with_onnx: bool = False
) -> float | None:
    """Writes the model of a complete checkpoint; returns the difference of its ONNX file to PyTorch, where it has one.
    scores: of a fine-tuned model, for its card. Raises RunFailure, and UserError as write_onnx does."""
    description = _description(run_dir, tag)
    description["card"] |= scores or {}
    return _write_state(run_dir, description, load_full_state(run_dir.checkpoints, tag), target, with_onnx=with_onnx)


def _write_state(
    run_dir: RunDir,
    description: dict[str, Any],
    state: dict[str, torch.Tensor],
    target: Path,
    *,
    with_onnx: bool = False,
) -> float | None:
    student, projections = split_state(state)
    return write_model(
        rebuild_student(description, student),
        description,
        projections,
        run_dir.tokenizer,
        target,
        history=History.read(run_dir.records, until=description["step"]),
        comparison=last_comparison(run_dir.records),
        with_onnx=with_onnx,
    )


def write_model(
    model: PreTrainedModel,
    description: dict[str, Any],
    projections: dict[str, torch.Tensor],
    tokenizer: Path,
    target: Path,
    *,
    history: History,
    comparison: Comparison | None = None,
    with_onnx: bool = False,
) -> float | None:
    """Writes a Hugging Face folder, never half; returns the difference of its ONNX file to PyTorch, where it has one.
    Raises RunFailure, and UserError as write_onnx does.

    tokenizer: a folder, which may be missing. The rest is for the model card (engine/train/card.py).
    """
    try:
        with replaced(target) as folder:
            with quiet():
                model.save_pretrained(folder)
            if projections:
                save_file(projections, folder / PROJECTIONS_FILE)
            if tokenizer.is_dir():
                shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
            make_portable(folder, model)
            vectors = description.get("vectors")
            if vectors is not None and (folder / MODULES).is_file():
                prefix = f"linears.{vectors['projection']}."
                linear = {key.removeprefix(prefix): x for key, x in projections.items() if key.startswith(prefix)}
                write_map(folder, linear, vectors["ways"])
            gap = write_onnx(model, description["head"], folder) if with_onnx else None
            card = folder / CARD
            card.write_text(model_card(folder, model.config, description, history, comparison), encoding="utf-8")
            for weights in folder.glob("*.safetensors"):  # safetensors lets nobody but the owner read them
                weights.chmod(card.stat().st_mode)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunFailure(f"{target} cannot be written: {reason}") from None
    return gap


def export_live(run_dir: RunDir, module: nn.Module, description: dict[str, Any]) -> None:
    """Writes the student of the model in training. Collective; rank 0 writes. Raises RunFailure."""
    state = full_state(module)
    if torch.distributed.get_rank() == 0:
        _write_state(run_dir, description, state, run_dir.student)


def add_comparison(run_dir: RunDir, description: dict[str, Any], comparison: Comparison) -> None:
    """Writes the card of an exported student anew, with the comparison. Raises RunFailure."""
    history = History.read(run_dir.records, until=description["step"])
    text = model_card(run_dir.student, _student_config(description), description, history, comparison)
    try:
        write_whole(run_dir.student / CARD, text.encode())
    except OSError as error:
        raise RunFailure(f"{run_dir.student / CARD} cannot be written: {error.strerror}") from None


def load_export(folder: Path) -> PreTrainedModel:
    """Returns an exported model as the class that it was exported as, on the CPU, in fp32, in eval mode; without a
    pooler, which no student has."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    kind = getattr(transformers, name)
    has_pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    with quiet():
        model: PreTrainedModel = kind.from_pretrained(folder, **({"add_pooling_layer": False} if has_pooler else {}))
    return model.eval()


def split_state(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the student's weights and those of the projections, without their prefixes; heads of losses are left
    out."""
    parts: dict[str, dict[str, torch.Tensor]] = {"student": {}, "projections": {}, "heads": {}}
    for name, tensor in state.items():
        owner, _, rest = name.partition(".")
        parts[owner][rest] = tensor
    return parts["student"], parts["projections"]


def rebuild_student(description: dict[str, Any], weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Returns the student in fp32 with exactly these weights. Raises RuntimeError when one is missing or left over.
    description: contents of EXPORT_FILE."""
    config = _student_config(description)
    model = model_class(config, description["head"])(config, **init_arguments(config, description["head"]))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise RuntimeError(f"checkpoint and student differ: missing {missing}, unexpected {unexpected}")
    return model.eval()


def _student_config(description: dict[str, Any]) -> PretrainedConfig:
    settings = dict(description["student_config"])
    config: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return config
