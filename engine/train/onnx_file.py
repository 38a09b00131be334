"""A model as an ONNX file beside its Hugging Face files: written, and compared with PyTorch before it is kept."""

from __future__ import annotations

import inspect
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.errors import UserError, first_line
from engine.models.fit import longest_input
from engine.models.hub import Head

ONNX_FILE = Path("onnx") / "model.onnx"
"""Where optimum and sentence-transformers look for it in a model's folder."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference to PyTorch of an output of a real token."""
SHAPES = ((1, 1), (1, 7), (3, 11), (5, 64))
"""Sequences and tokens at which the file is compared with PyTorch."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TASK_OUTPUTS: dict[Head, tuple[str, ...]] = {"classification": ("logits",), "span": ("start_logits", "end_logits")}
"""Outputs of models with the head of a task; of all others the encoder is written."""


class _Positional(nn.Module):
    """A model with inputs by position and a tuple of outputs, as the exporter takes it."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(found[name] for name in self.outputs)


def require_onnx() -> None:
    """Raises UserError where a package is missing that writes or runs ONNX files."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"format='onnx': missing Python packages: {', '.join(missing)}; pip install {' '.join(missing)}"
        )


def write_onnx(model: PreTrainedModel, head: Head, folder: Path) -> float:
    """Writes ONNX_FILE into an exported folder; returns the largest difference to PyTorch over the real tokens.

    Inputs, int64, (batch, length): input_ids, attention_mask, and token_type_ids where the model knows several types.
    Outputs, float32: last_hidden_state (batch, length, width); logits (batch, labels) of a classifier; start_logits and
    end_logits (batch, length) of a model that answers questions. Raises UserError where torch.onnx cannot write the
    model, or the difference exceeds TOLERANCE.
    """
    outputs = TASK_OUTPUTS.get(head, ("last_hidden_state",))
    part: Any = model if head in TASK_OUTPUTS else model.base_model
    module = _Positional(part, _inputs_of(part), outputs).eval()
    path = folder / ONNX_FILE
    path.parent.mkdir()
    try:
        _export(module, path)
        gap = _largest_gap(module, path)
    except (OSError, UserError):
        raise
    except Exception as error:  # the exporter and the runtime raise many kinds
        raise UserError(
            f"format='onnx': torch.onnx cannot export {type(part).__name__} ({first_line(error)[:200]}); leave "
            "--format out"
        ) from None
    if not gap <= TOLERANCE:
        raise UserError(
            f"format='onnx': the outputs of the file differ from PyTorch's by {gap:.1e}, more than {TOLERANCE:.0e}; "
            "leave --format out"
        )
    return gap


def open_session(path: Path) -> Any:
    """Returns an InferenceSession of an ONNX file on the CPU, with as many threads as PyTorch has. Raises UserError for
    a file that onnxruntime does not read."""
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise UserError(f"{path}: onnxruntime cannot read it ({first_line(error)[:200]}); export it again") from None


def _inputs_of(model: PreTrainedModel) -> tuple[str, ...]:
    known = inspect.signature(model.forward).parameters
    has_types = "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1
    return INPUTS if has_types else INPUTS[:2]


def _export(module: _Positional, path: Path) -> None:
    """Writes the file, without the notes of the exporter on the lines of code that the operators come from: they name
    folders of this machine."""
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest_input(module.model.config))}
    logging.disable(logging.WARNING)  # of operators that this machine does not have, and constants that it keeps
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.export.export(
                module,
                _example(module, 2, 8),
                dynamic_shapes={"tensors": tuple(axes for _ in module.inputs)},
                strict=False,
            )
            program: Any = torch.onnx.export(
                traced,
                (),
                input_names=list(module.inputs),
                output_names=list(module.outputs),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    for graph in (program.model.graph, *program.model.functions.values()):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
    program.save(str(path))


def _example(module: _Positional, batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """Returns random inputs, the first sequence without pads."""
    config: Any = module.model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - 2 * row) :] = 0
    pad = config.pad_token_id or 0
    ids = torch.where(mask.bool(), torch.where(ids == pad, (pad + 1) % config.vocab_size, ids), pad)
    types = torch.zeros_like(ids)
    types[:, length // 2 :] = 1
    return (ids, mask, types)[: len(module.inputs)]


def _largest_gap(module: _Positional, path: Path) -> float:
    """Returns the largest difference between file and model at SHAPES, as far as the model takes such lengths."""
    session = open_session(path)
    limit = longest_input(module.model.config)
    gaps = []
    for batch, length in SHAPES:
        tensors = _example(module, batch, length if limit is None else min(length, limit))
        feed = {name: tensor.numpy() for name, tensor in zip(module.inputs, tensors, strict=True)}
        with torch.inference_mode():
            wanted = module(*tensors)
        for want, got in zip(wanted, session.run(list(module.outputs), feed), strict=True):
            gap = (want - torch.from_numpy(got)).abs()
            gaps.append(gap[tensors[1].bool()] if gap.shape[:2] == tensors[1].shape else gap)
    return torch.cat([gap.flatten() for gap in gaps]).max().item()
