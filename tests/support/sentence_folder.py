"""Folders of sentence-transformers, written by hand around an encoder as its versions write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."
MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def surround(
    folder: Path,
    kinds: Sequence[str] = ("Pooling", "Normalize"),
    *,
    encoder: str = "",
    pooling: dict[str, Any] = MEAN,
    reading: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    library: str = OLD,
) -> Path:
    """Adds the modules to a folder whose encoder lies in its folder `encoder`. Dense layers are 32 x 24."""
    entries = [{"idx": 0, "name": "0", "path": encoder, "type": f"{library}Transformer"}]
    for index, kind in enumerate(kinds, start=1):
        place = f"{index}_{kind}"
        entries.append({"idx": index, "name": str(index), "path": place, "type": f"{library}{kind}"})
        if kind == "Pooling":
            write_json(folder / place / "config.json", pooling)
        if kind == "Dense":
            activation = "torch.nn.modules.activation.Tanh"
            sizes = {"in_features": 32, "out_features": 24, "bias": True, "activation_function": activation}
            write_json(folder / place / "config.json", sizes)
            generator = torch.Generator().manual_seed(0)
            linear = {"weight": torch.randn(24, 32, generator=generator), "bias": torch.randn(24, generator=generator)}
            save_file({f"linear.{name}": value for name, value in linear.items()}, folder / place / "model.safetensors")
    write_json(folder / "modules.json", entries)
    if reading is not None:
        write_json(folder / encoder / "sentence_bert_config.json", reading)
    if settings is not None:
        write_json(folder / "config_sentence_transformers.json", settings)
    return folder
