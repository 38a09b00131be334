"""Files of a model folder or hub model: found, looked at before a library reads them, and compared by hashes."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub.constants import ENDPOINT
from safetensors import safe_open

from engine.errors import UserError, first_line

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONVERT = (
    'convert it where you trust it: python -c "from transformers import AutoModel; '
    "AutoModel.from_pretrained('FOLDER').save_pretrained('NEW')\" (an MLM head needs AutoModelForMaskedLM)"
)
OTHER_WEIGHTS = (".h5", ".msgpack", ".gguf", ".onnx", ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".distcp")
"""Endings of weights in other formats, or under other names."""
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 64, 64 * 1024
_pickle_allowed = False


def allow_pickle(allowed: bool) -> None:
    """Sets whether this process may read weights from pickles (pytorch_model.bin), and then tensors only. A plan sets
    it from its configuration. One switch of the process: no call that loads something can forget to ask."""
    global _pickle_allowed
    _pickle_allowed = allowed


@cache
def hub_is_reachable() -> bool:
    """Tells whether the hub can be reached. Asks it a single time, before huggingface_hub does, which retries for half
    a minute: so a mistyped folder is reported at once."""
    if getproxies():
        return True  # only a request can tell
    url = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=5):
            return True
    except OSError:
        return False


def lookup(path: str) -> dict[str, bool]:
    """Returns arguments for from_pretrained: a folder or the hub's cache alone, where nothing else can be had."""
    return {"local_files_only": Path(path).is_dir() or not hub_is_reachable()}


def safety() -> dict[str, Any]:
    """Returns arguments for a model's from_pretrained: no pickle unless it is allowed, and never an object out of
    one."""
    return {"use_safetensors": None if _pickle_allowed else True, "weights_only": True}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars and the table of unexpected keys; what matters of it is checked and raised here."""
    from transformers.utils import logging as hf_logging

    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def own_code_error(path: str, key: str, what: str) -> UserError:
    """Returns the error for `what` of a model that only its own code can make."""
    return UserError(
        f"{key}={path!r}: its {what} asks for Python code that comes with the model (auto_map), and such code is "
        "never run here; name a model whose class is part of transformers"
    )


def unreadable(path: str, key: str, what: str, error: Exception) -> UserError:
    """Returns the one-line error for what a library raised while it read `what` of a model."""
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return own_code_error(path, key, what)
    if isinstance(error, ImportError):
        package = f" (pip install {error.name})" if error.name else ""
        return UserError(f"{key}={path!r}: its {what} needs a package that is not installed{package}: {reason}")
    if Path(path).is_dir():
        return UserError(f"{key}={path!r}: cannot read the {what} in this folder: {reason}")
    return UserError(
        f"{key}={path!r}: no such folder (from {Path.cwd()}), and the hub gave no {what} of that name: {reason} "
        "Name a folder with config.json and model.safetensors, or a hub model while the hub can be reached."
    )


def require_whole(file: Path, key: str) -> None:
    """Raises UserError for a file that is a dangling link, empty, a git-lfs pointer, or torn (JSON and safetensors)."""
    if not file.exists():
        raise UserError(f"{key}: {file} is a link to {os.readlink(file)}, which is not there; copy the file itself")
    with file.open("rb") as data:
        start = data.read(len(LFS_POINTER))
    if not start:
        raise UserError(f"{key}: {file} is empty; copy or download it again")
    if start == LFS_POINTER:
        raise UserError(f"{key}: {file} is a git-lfs pointer, not the file itself; run `git lfs pull` in {file.parent}")
    if file.suffix == ".json":
        read_json(file, key)
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="np"):  # torch need not be there for that
                pass
        except Exception as error:  # its own, and OSError
            raise UserError(f"{key}: {file} is cut, or no safetensors file ({error}); copy it again") from None


def read_json(file: Path, key: str, kind: type = dict) -> Any:
    """Returns the object (or list: `kind`) in a JSON file. Raises UserError for anything else."""
    try:
        values = json.loads(file.read_bytes().decode())  # as transformers reads it: no byte order mark, no UTF-16
    except ValueError as error:  # of JSON, and of UTF-8
        raise UserError(f"{key}: {file} is torn, or no JSON in UTF-8 ({error}); copy or download it again") from None
    if not isinstance(values, kind):
        raise UserError(
            f"{key}: {file} holds a {type(values).__name__}, not a {kind.__name__}; copy or download it again"
        )
    return values


def require_whole_files(path: str, key: str, names: tuple[str, ...]) -> None:
    """Checks those of the named files that a folder has. The hub's cache is checked by its own library."""
    folder = Path(path)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():  # not glob, which leaves dangling links out
        if any(file.match(name) for name in names):
            require_whole(file, key)


def optional_file(path: str, file_name: str) -> Path | None:
    """Returns a file of a model folder or hub model that it may lack; None where it does, or cannot be reached."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        path,
        file_name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **lookup(path),
    )
    return None if found is None else Path(found)


def weight_file(path: str, key: str) -> Path:
    """Returns the first of WEIGHT_FILES that the model has. Raises UserError where it has none, and for a pickle that
    is not allowed or a file that is not whole."""
    for file_name in WEIGHT_FILES:
        found = find_file(path, file_name, key)
        if found is not None:
            _require_no_pickle(path, key, file_name)
            require_whole(found, key)
            return found
    raise UserError(f"{key}={path!r}: found none of {', '.join(WEIGHT_FILES)}; {_likely_weights(Path(path))}")


def _likely_weights(folder: Path) -> str:
    """Returns what a folder has that may be the weights, and what to do with it."""
    if (folder / "zero_to_fp32.py").is_file():
        command = f"python {folder}/zero_to_fp32.py --safe_serialization {folder} {folder}"
        return f"its weights are in a checkpoint of DeepSpeed: {command}"
    others = sorted(file.name for file in folder.glob("*") if file.suffix in OTHER_WEIGHTS and file.is_file())
    if not others:
        return "the model has no weights"
    if "-of-" in others[0]:
        return f"{others[0]} is a part of them, whose index is missing: copy the file that ends in .index.json too"
    return f"{others[0]} has another format or name; save the model with save_pretrained in PyTorch, as safetensors"


def find_file(path: str, file_name: str, key: str, *, what: str = "weights") -> Path | None:
    """Returns a file of a folder or hub model; None where the model has none of that name. what: what it holds, for
    errors. Raises UserError."""
    inside = Path(path) / file_name
    if inside.is_symlink():
        require_whole(inside, key)
    if Path(path).is_dir():
        return inside if inside.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(path, file_name, _raise_exceptions_for_missing_entries=False, **lookup(path))
    except Exception as error:
        raise unreadable(path, key, what, error) from None
    return None if found is None else Path(found)


def _require_no_pickle(path: str, key: str, file_name: str) -> None:
    if ".safetensors" not in file_name and not _pickle_allowed:
        raise UserError(
            f"{key}={path!r}: its weights are in {file_name}, a Python pickle, which can hold anything; {CONVERT}, or "
            "write allow_pickle=true (of it, tensors are read and nothing else)"
        )


def weight_files(path: str, key: str) -> list[Path]:
    """Returns the files that hold the tensors, in the order of their names. Raises UserError when one is missing or
    torn."""
    index = weight_file(path, key)
    if not index.name.endswith(".index.json"):
        return [index]
    named = read_json(index, key).get("weight_map")
    if not isinstance(named, dict):
        raise UserError(f"{key}: {index} has no weight_map; copy or download it again")
    files = []
    for name in sorted(set(named.values())):
        file = find_file(path, name, key)
        if file is None:
            raise UserError(f"{key}: {index} names {name}, which is not there; copy or download it too")
        require_whole(file, key)
        files.append(file)
    return files


def stored_tensors(path: str, key: str) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of a checkpoint, without reading the tensors. Raises UserError for files
    that are missing or torn, or hold something else."""
    import torch

    stored: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path, key):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                stored |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            continue
        try:
            # PyTorch's format before 1.6 is no zip, and cannot be mapped
            saved = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # pickle's, and torch's
            kind = type(error).__name__  # torch's text says how to run what is in there
            raise UserError(
                f"{key}: {file} is torn, or holds something else than tensors ({kind}); copy it again, or {CONVERT}"
            ) from None
        entries: dict[str, Any] = saved if isinstance(saved, dict) else {f"a {type(saved).__name__}": None}
        others = [str(name) for name, entry in entries.items() if not isinstance(entry, torch.Tensor)]
        if others:
            raise UserError(
                f"{key}: {file} holds something else than tensors ({', '.join(others[:3])}); save a model's state_dict "
                "alone in its place"
            )
        stored |= {name: tuple(tensor.shape) for name, tensor in entries.items()}
    return stored


def weights_fingerprint(path: str, key: str) -> str:
    """Returns a hash that changes when weights are replaced, without reading them all: sha256 over the size and 64
    evenly spaced blocks of 64 KiB of each weight file (first and last block among them)."""
    digest = hashlib.sha256()
    for file in weight_files(path, key):
        size = file.stat().st_size
        digest.update(str(size).encode())
        last = max(0, size - FINGERPRINT_BLOCK)
        with file.open("rb") as data:
            for i in range(FINGERPRINT_BLOCKS):
                data.seek(last * i // (FINGERPRINT_BLOCKS - 1))
                digest.update(data.read(FINGERPRINT_BLOCK))
    return digest.hexdigest()[:16]
