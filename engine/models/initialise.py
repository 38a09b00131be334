"""Student weights from teacher weights: which layer comes from where, and how a wide tensor becomes a narrow one.

A narrower student gets evenly spaced units of each width: Weight Selection (Xu et al., "Initializing Models with Larger
Ones", arXiv 2311.18823). Out of n units k are taken at 0, n/k, 2n/k ... when k divides n, else at the rounded points of
an even grid from the first to the last unit. One choice per width holds in every tensor (embeddings, LayerNorms,
attention, feed-forward), so that a unit keeps its meaning. Heads are taken whole; where heads get narrower, evenly
spaced dimensions of each are taken, the same for queries, keys and values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from engine.errors import UserError
from engine.mapping import LayerMapping, parse_mapping
from engine.models.capture import layer_modules
from engine.models.hub import shape_of

KEY = "student.init"
NAMES = "random, mapping, uniform, every-other, first, last"

# Module name -> what the axes of its weight are (D hidden, E embedding, A attention, H heads, F feed-forward, - kept
# whole). A bias or a LayerNorm weight has the first axis only. Used by the model types in NARROWABLE.
AXES: tuple[tuple[str, str], ...] = (
    (r"embeddings\.(word|position|token_type)_embeddings", "-E"),
    (r"embeddings\.LayerNorm", "E"),
    (r"embeddings_project", "DE"),
    (r"attention\.self\.(query|key|value)|attention\.[qkv]_lin|attention\.attn\.[qkv]", "AD"),
    (r"attention\.output\.dense|attention\.out_lin|attention\.attn\.o", "DA"),
    (r"attention\.output\.LayerNorm|sa_layer_norm|attention\.LayerNorm", "D"),
    (r"relative_attention_bias", "-H"),
    (r"intermediate\.dense|ffn\.lin1", "FD"),
    (r"output\.dense|ffn\.lin2", "DF"),
    (r"output\.LayerNorm|output_layer_norm", "D"),
    (r"generator_predictions\.dense", "ED"),
    (r"generator_predictions\.LayerNorm", "E"),
    (r"generator_lm_head", "-E"),
    (r"predictions\.transform\.dense|lm_head\.dense|vocab_transform", "DD"),
    (r"predictions\.transform\.LayerNorm|lm_head\.layer_norm|vocab_layer_norm", "D"),
    (r"predictions\.decoder|lm_head\.decoder|vocab_projector", "-D"),
    (r"cls\.predictions|lm_head", "-"),
)
NARROWABLE = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet")


def resolve_init(text: str, M: int, N: int, hidden_map: LayerMapping | None) -> tuple[int, ...]:
    """Returns the teacher layer (1..N) that each of M student layers starts from; 0 = random.

    hidden_map: what `mapping` stands for. Raises UserError, naming student.init, for a text that is none of NAMES and
    no list of layers.
    """
    if text == "random":
        return (0,) * M
    if text == "mapping":
        if hidden_map is None:
            raise UserError(f"{KEY}='mapping' needs a hidden-state mapping; choose another of {NAMES}")
        return hidden_map.genes
    if text == "every-other":
        if 2 * M > N:
            raise UserError(f"{KEY}='every-other': {M} student layers need a teacher with {2 * M} layers, not {N}")
        return tuple(range(2, 2 * M + 1, 2))
    if text not in ("uniform", "first", "last") and not re.fullmatch(r"\d+(-\d+)*", text):
        raise UserError(f"{KEY}={text!r}: choose {NAMES}, or teacher layers like {'-'.join(['1', *['0'] * (M - 1)])}")
    return parse_mapping(text, student_layers=M, teacher_layers=N, key=KEY).genes


def evenly_spaced(count: int, out_of: int) -> torch.Tensor:
    """Returns (count,) int64 indices into `out_of` units."""
    if out_of % count == 0:
        return torch.arange(count) * (out_of // count)
    # a grid from the first to the last unit, halves up, in integers (floats would round ties by the platform)
    return torch.tensor([(2 * i * (out_of - 1) + count - 1) // (2 * (count - 1)) for i in range(count)])


@dataclass(frozen=True)
class Widths:
    hidden: int
    embedding: int
    heads: int
    head: int
    intermediate: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Widths:
        hidden, heads = config.hidden_size, config.num_attention_heads
        return cls(hidden, getattr(config, "embedding_size", hidden), heads, hidden // heads, intermediate_size(config))


def intermediate_size(config: PretrainedConfig) -> int:
    """Returns the width of the feed-forward layer (DistilBERT calls it hidden_dim). Raises UserError where it has no
    name."""
    width = getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None)
    if width is None:
        raise UserError(f"model type {config.model_type!r}: its configuration names no width of the feed-forward layer")
    return int(width)


class Selection:
    """Which units of each teacher width the student takes. Raises UserError where there is no such choice."""

    def __init__(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        narrow, wide = Widths.from_config(student), Widths.from_config(teacher)
        self.same = narrow == wide
        if self.same:
            return
        for name in ("hidden", "embedding", "heads", "head", "intermediate"):
            k, n = getattr(narrow, name), getattr(wide, name)
            if k > n:
                size = {"heads": "heads", "head": "hidden_size/heads", "intermediate": "intermediate_size"}
                raise UserError(
                    f"{KEY}: weights can only be taken from a teacher that is at least as wide, but the student has "
                    f"{size.get(name, 'hidden_size')}={k} and the teacher {n}; write student.init=random or reduce it"
                )
        if student.model_type not in NARROWABLE:
            raise UserError(
                f"{KEY}: taking part of a width is not supported for model type {student.model_type!r} (only for "
                f"{', '.join(NARROWABLE)}); write student.init=random or keep the teacher's widths and heads"
            )
        if (narrow.embedding == narrow.hidden) != (wide.embedding == wide.hidden):
            raise UserError(
                f"{KEY}: with hidden_size={narrow.hidden} the student has no projection from its embeddings of width "
                f"{narrow.embedding}, which the teacher has; write student.init=random or another hidden_size"
            )
        dims = evenly_spaced(narrow.head, wide.head)
        heads = evenly_spaced(narrow.heads, wide.heads)
        self.index = {
            "D": evenly_spaced(narrow.hidden, wide.hidden),
            "E": evenly_spaced(narrow.embedding, wide.embedding),
            "A": (heads[:, None] * wide.head + dims[None, :]).flatten(),
            "H": heads,
            "F": evenly_spaced(narrow.intermediate, wide.intermediate),
        }

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the student's part of the teacher's tensor `name` (as in a state dict): fewer indices in each
        axis."""
        if self.same:
            return tensor
        module = name.rpartition(".")[0]
        axes = next((axes for pattern, axes in AXES if re.search(rf"(^|\.)({pattern})$", module)), None)
        assert axes is not None, f"no width rule for {name}"
        for dim, axis in zip(range(tensor.ndim), axes, strict=False):
            if axis != "-":
                tensor = tensor.index_select(dim, self.index[axis])
        return tensor


def _layer_paths(model: PreTrainedModel) -> list[str]:
    paths = {id(module): path for path, module in model.base_model.named_modules()}
    return [paths[id(layer)] for layer in layer_modules(model)]


@torch.no_grad()
def copy_from_teacher(student: PreTrainedModel, teacher: PreTrainedModel, sources: tuple[int, ...]) -> None:
    """Overwrites the student's embeddings, the layers whose source is not 0, what follows the layers, and the MLM head
    when both have one. Both models are on the CPU and of one model type.

    Layers that are shared (ALBERT) are copied as the groups they are. ModernBERT's first layer has no attention norm:
    a later student layer that starts from it keeps its fresh one.
    """
    select = Selection(student.config, teacher.config)
    to_paths, from_paths = _layer_paths(student), _layer_paths(teacher)
    shared = len(to_paths) != len(sources) or len(from_paths) != shape_of(teacher.config, has_mlm_head=False).layers
    if shared and len(to_paths) != len(from_paths):
        raise UserError(
            f"{KEY}: the student has {len(to_paths)} groups of shared layers and the teacher {len(from_paths)}; "
            "write student.init=random or another student.layers"
        )
    origin: dict[str, str | None]
    if shared:
        origin = dict(zip(to_paths, from_paths, strict=True))
    else:
        origin = {path: from_paths[g - 1] if g else None for path, g in zip(to_paths, sources, strict=True)}
    _copy_state(student.base_model, teacher.base_model, origin, select)
    head, prefix = teacher.get_output_embeddings(), f"{student.base_model_prefix}."
    if head is not None and student.get_output_embeddings() is not None:
        own, theirs = student.state_dict(), teacher.state_dict()
        matrix: Any = student.get_input_embeddings().weight
        embeddings = matrix.data_ptr()
        for name in own:  # a tied output matrix has them already, also where the teacher's is another one
            if not name.startswith(prefix) and own[name].data_ptr() != embeddings:
                own[name].copy_(select(name, theirs[name]))


def _copy_state(student: nn.Module, teacher: nn.Module, origin: dict[str, str | None], select: Selection) -> None:
    """Overwrites the student's tensors. origin: path of a student layer -> path of the teacher layer it starts from, or
    None."""
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        layer = next((path for path in origin if name.startswith(f"{path}.")), None)
        old = name
        if layer is not None:
            source = origin[layer]
            if source is None:
                continue
            old = source + name.removeprefix(layer)
        if old in theirs:
            value = select(old, theirs[old])
            if value.shape != tensor.shape:  # of something whose size depends on the number of layers
                raise UserError(
                    f"{KEY}: {name} is {tuple(tensor.shape)} in the student, {tuple(value.shape)} in the teacher: "
                    "this model type cannot be copied; write student.init=random"
                )
            tensor.copy_(value)
