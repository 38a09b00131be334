"""Makes an exported folder load elsewhere: in transformers from 4.57 on, in sentence-transformers where the teacher
does, and without a trace of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from yaml import YAMLError

from engine.hub.files import optional_file
from engine.hub.sentence import MAP_FOLDER, WEIGHTS, SentenceEncoder, read_sentence_encoder
from engine.models.fit import longest_input

OF_THIS_MACHINE = ("_name_or_path", "name_or_path", "backend", "is_local", "local_files_only", "tokenizer_file")
"""Keys that transformers 5 writes into configurations, which say who read the model, and from where."""
OF_THE_TEACHER = ("auto_map",)
"""Keys that name Python files, which lie beside the teacher and were not run here."""
RENAMED = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes that transformers 4 does not know, and their names there, which 5 knows too."""


def make_portable(folder: Path, model: PreTrainedModel) -> None:
    """Rewrites the JSON files of an export of `model`. Raises OSError."""
    for name in ("config.json", "generation_config.json"):
        _rewrite(folder / name)
    limit = longest_input(model.config)
    tokenizer: dict[str, Any] = _rewrite(folder / "tokenizer_config.json")
    if tokenizer:
        tokenizer["tokenizer_class"] = RENAMED.get(tokenizer["tokenizer_class"], tokenizer["tokenizer_class"])
        if limit is not None:
            tokenizer["model_max_length"] = min(limit, tokenizer.get("model_max_length", limit))
        _write(folder / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rewrite(path: Path) -> dict[str, Any]:
    """Takes the keys of OF_THIS_MACHINE and OF_THE_TEACHER out of a file; returns the others, none where it is
    missing."""
    if not path.is_file():
        return {}
    values = {key: value for key, value in _read(path).items() if key not in OF_THIS_MACHINE + OF_THE_TEACHER}
    _write(path, values)
    return values


def sentence_student(
    teacher: str, tokenizer: PreTrainedTokenizerFast, student: PretrainedConfig, map_bias: bool | None = None
) -> tuple[SentenceEncoder | None, list[str]]:
    """Returns what makes the export of a student a sentence encoder, and a sentence for each difference to its teacher;
    None, and the reason, where the files of the teacher are not understood. map_bias: of the map to the teacher's width
    that its vectors are trained through; None without such a map. Raises UserError for files that are not whole."""
    own, reason = read_sentence_encoder(teacher, "teacher.path")
    if own is None:
        plain = f"teacher.path={teacher!r}: the student will be no sentence encoder: {reason}"
        return None, [plain] if reason else []
    found = own.for_student(student.hidden_size, longest_input(student), map_bias)
    notes = []
    if len(found.dense) < len(own.dense):
        notes.append(
            "the teacher's dense layer behind the pooling takes its own width, not the student's "
            f"{student.hidden_size}: the student's vectors are its pooled states"
        )
    if own.lower_case and tokenizer.tokenize("A") != tokenizer.tokenize("a"):
        notes.append(
            "sentence-transformers makes texts lower case before the teacher's tokenizer reads them (do_lower_case), "
            "but the corpus has capitals; make its text lower case, too"
        )
    return found, notes


def write_map(folder: Path, linear: Mapping[str, torch.Tensor], copies: int) -> None:
    """Writes the weights of the Dense layer behind the pooling (`for_student` with map_bias) into an export: those of a
    linear map, `copies` times for as many vectors side by side. Raises OSError."""
    weights = {"linear.weight": torch.block_diag(*[linear["weight"]] * copies)}
    if "bias" in linear:
        weights["linear.bias"] = linear["bias"].repeat(copies)
    place = folder / MAP_FOLDER
    place.mkdir(exist_ok=True)
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, place / WEIGHTS)


def public_name(path: str) -> str:
    """Returns a hub model's name, also of its folder in the hub's cache, or the last part of a folder's: where it lies
    is nobody's business."""
    folder = Path(path).resolve()
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name if folder.exists() or Path(path).is_absolute() else path


def base_model_of(path: str) -> str | None:
    """Returns the public name of a model, where a card may have it as that of the model it was made from; None where
    the hub takes no such name."""
    name = public_name(path)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def licences_of(model: str) -> list[str]:
    """Returns the licences that a model's card names; none where it names none, or cannot be read."""
    card = optional_file(model, "README.md")
    try:
        named = ((metadata_load(card) if card is not None else None) or {}).get("license") or []
    except (OSError, ValueError, YAMLError):  # no UTF-8, or no front matter that can be read
        return []
    return [str(name) for name in (named if isinstance(named, list) else [named])]
