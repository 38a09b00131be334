"""The settings that a configuration dataclass has: names, types, defaults and documentation."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints

from engine.config.deepspeed_file import NAMES

ELSEWHERE = {*NAMES["zero_optimization"], *NAMES["bf16"], *NAMES["fp16"], "zero_optimization", "bf16", "fp16"} | {
    "train_micro_batch_size_per_gpu"
}
"""Names that DeepSpeed's file has, and no configuration."""

_BATCH = ("global_batch", "batch")
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "max_steps": ("steps",),
    "num_train_steps": ("steps",),
    "num_train_epochs": ("epochs", "steps"),
    "num_epochs": ("epochs", "steps"),
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "warmup_ratio": ("warmup_share", "warmup_steps"),
    "lr_scheduler_type": ("schedule",),
    "max_grad_norm": ("grad_clip",),
    "gradient_clipping": ("grad_clip",),
    "seed": ("seeds",),
    "data_seed": ("seed", "seeds"),
    "gradient_checkpointing": ("activation_checkpointing",),
    "logging_steps": ("log_every",),
    "eval_steps": ("eval_every",),
    "save_steps": ("save_every",),
    "save_total_limit": ("keep",),
    "load_best_model_at_end": ("keep_best",),
    "early_stopping_patience": ("patience",),
    "early_stopping_threshold": ("patience_threshold",),
    "resume_from_checkpoint": ("resume",),
    "max_seq_length": ("seq_len",),
    "max_length": ("seq_len",),
    "model_name_or_path": ("path",),
    "model": ("path",),
    "num_hidden_layers": ("layers",),
    "num_attention_heads": ("heads",),
    "hidden_dropout_prob": ("dropout",),
    "adam_epsilon": ("eps",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "overwrite_output_dir": ("resume",),
    "to": ("output_dir",),
    "out": ("output_dir",),
    "tokenizer_name": ("tokenizer",),
    "torch_dtype": ("dtype",),
    "attn_implementation": ("attention",),
}
"""Names of Hugging Face's Trainer and configurations: what of it may be called here."""
_NOTES = {
    "per_device_train_batch_size": " It counts all ranks; the DeepSpeed JSON sets the micro batch of a rank",
    "gradient_accumulation_steps": " It counts all ranks; the accumulation follows from it",
}
"""What is otherwise than under the other name."""
_PRECISIONS = ("bf16", "fp16")


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Returns field -> the string literal that follows it in the source, of the class or of one that it extends."""
    docs: dict[str, str] = {}
    for one in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
        for node, following in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(following, ast.Expr)
            ):
                value = following.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    docs[node.target.id] = " ".join(value.value.split())
    return docs


@dataclass(frozen=True)
class Setting:
    key: str
    """`section.name`, or `name` at the top level."""
    hint: Any
    """Type, with annotations."""
    default: Any
    """MISSING: it is required."""
    owner: type[Any]
    """Dataclass that has it."""


class Schema:
    """Settings of one configuration class. Its sections are its fields that are dataclasses themselves."""

    def __init__(self, config_class: type[Any]) -> None:
        self.sections: dict[str, Any] = {}
        """Name -> the section with all of its defaults."""
        self.settings: dict[str, Setting] = {}
        """Settings by key, in the order of the source."""
        for name, hint, default in _fields(config_class):
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                self.sections[name] = default
                for inner, inner_hint, _ in _fields(type(default)):
                    key = f"{name}.{inner}"
                    self.settings[key] = Setting(key, inner_hint, getattr(default, inner), type(default))
            else:
                self.settings[name] = Setting(name, hint, default, config_class)

    def hint(self, unknown: str) -> str:
        """Returns what somebody may have meant by a name that is no setting."""
        name = unknown.lower().replace("-", "_")
        above, _, leaf = name.rpartition(".")
        if leaf in self.sections:
            if above:
                return f"{leaf!r} is a section of the top level: check the indentation"
            return f"{leaf!r} is a section: name a setting of it, like {self._first_key(leaf)!r}"
        if namesakes := self._keys_named(leaf, above) or self._keys_by_other_name(leaf, above):
            return f"did you mean {' or '.join(map(repr, namesakes))}?{_NOTES.get(leaf, '')}"
        if leaf in _PRECISIONS and "deepspeed_config" in self.settings:
            return f"precision is set by the DeepSpeed JSON: write --deepspeed_config ds_configs/zero1_{leaf}.json"
        if name in ELSEWHERE and "deepspeed_config" in self.settings:
            return f"{name!r} belongs in the DeepSpeed JSON that deepspeed_config names"
        if above in self.sections:
            here = [key.rpartition(".")[2] for key in self.settings if key.startswith(f"{above}.")]
            close = difflib.get_close_matches(leaf, here, n=1)
            return f"did you mean '{above}.{close[0]}'?" if close else f"{above} has {', '.join(here)}"
        close = difflib.get_close_matches(name, [*self.settings, "print_config"], n=1)
        return f"did you mean {close[0]!r}?" if close else "--help lists every setting"

    def _keys_named(self, leaf: str, above: str) -> list[str]:
        """Returns the settings of that name: the one of the section `above`, or those of all."""
        found = [key for key in self.settings if key.rpartition(".")[2] == leaf]
        return [key for key in found if key == f"{above}.{leaf}"] or found

    def _keys_by_other_name(self, leaf: str, above: str) -> list[str]:
        return next(filter(None, (self._keys_named(ours, above) for ours in OTHER_NAMES.get(leaf, ()))), [])

    def _first_key(self, section: str) -> str:
        return next(key for key in self.settings if key.startswith(f"{section}."))


def _fields(config_class: type[Any]) -> list[tuple[str, Any, Any]]:
    """Returns (name, type, default) of each field."""
    hints = get_type_hints(config_class, include_extras=True)
    return [
        (one.name, hints[one.name], one.default if one.default_factory is MISSING else one.default_factory())
        for one in dataclasses.fields(config_class)
    ]
