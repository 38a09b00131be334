"""A DeepSpeed JSON as it was written: names, places and types. DeepSpeed ignores many names that it does not know, so
that a typing error would silently train something else."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from engine.config.checks import Problem, SettingsError, refuse
from engine.config.nodes import Entries, compose, line_of, read_text
from engine.config.places import SHIPPED
from engine.errors import UserError

FOLDER = SHIPPED / "ds_configs"

ZERO = "zero_optimization"
TRACKERS = {"wandb": "wandb", "comet": "comet_ml", "csv_monitor": None}
"""Sections of services that are sent a run's curves, and the Python package that each needs."""
_OFFLOAD = "device nvme_path buffer_count pin_memory"
NAMES: dict[str, frozenset[str]] = {
    place: frozenset(names.split())
    for place, names in {
        "": """
            train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
            steps_per_print zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer bf16 fp16
            data_types communication_data_type prescale_gradients gradient_predivide_factor wall_clock_breakdown
            dump_state memory_breakdown comms_logger flops_profiler aio checkpoint torch_autocast compile timers
            hybrid_engine wandb comet csv_monitor""",
        "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
        "fp16": """
            enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
            min_loss_scale fp16_master_weights_and_grads""",
        ZERO: """
            stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
            allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
            elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size prefetch_bucket_size
            stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
            model_persistence_threshold stage3_model_persistence_threshold max_live_parameters
            stage3_max_live_parameters max_reuse_distance stage3_max_reuse_distance
            gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save module_granularity_threshold
            stage3_module_granularity_threshold use_all_reduce_for_fetch_params
            stage3_use_all_reduce_for_fetch_params allgather_sequential stage3_allgather_sequential
            ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size
            zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
            memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings
            enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module""",
        f"{ZERO}.offload_param": f"{_OFFLOAD} buffer_size max_in_cpu",
        f"{ZERO}.offload_optimizer": f"""
            {_OFFLOAD} pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc""",
        "flops_profiler": """
            enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file""",
        "checkpoint": "tag_validation parallel_write",
        "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
        "torch_autocast": "enabled dtype lower_precision_safe_modules",
        "wandb": "enabled group team project",
        "comet": "enabled project workspace api_key experiment_name online",
        "csv_monitor": "enabled",
    }.items()
}
"""Names that each checked object may have; "" is the file. `checkpoint` has no more than these:
other writers (asynchronous ones) would be hashed before they have written."""

_GONE = "DeepSpeed no longer has it; remove it"
_OLD_OFFLOAD = 'an old name; to offload write "{}": {{"device": "cpu"}} in its place, else remove it'
REMEDIES = {
    "optimizer": "remove it: optim.* and train.lr of the run config own the optimizer",
    "scheduler": "remove it: train.schedule and train.warmup_steps of the run config own the schedule",
    "tensorboard": "remove it: every run writes TensorBoard's events into its output_dir",
    "activation_checkpointing": "remove it: student.activation_checkpointing (fine-tuning: model.…) owns it",
    "bfloat16": "the old name of bf16; write that",
    "amp": _GONE,
    "sparse_gradients": _GONE,
    "graph_harvesting": _GONE,
    "allgather_size": f"an old name; write allgather_bucket_size into {ZERO}",
    f"{ZERO}.cpu_offload": _OLD_OFFLOAD.format("offload_optimizer"),
    f"{ZERO}.cpu_offload_params": _OLD_OFFLOAD.format("offload_param"),
    f"{ZERO}.cpu_offload_param": _OLD_OFFLOAD.format("offload_param"),
    f"{ZERO}.cpu_offload_use_pin_memory": 'an old name; write "pin_memory" into offload_optimizer and offload_param',
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": (
        "an old name; write stage3_gather_16bit_weights_on_model_save in its place"
    ),
    "comet.samples_log_interval": "remove it: train.log_every of the run config owns it",
    "comet.experiment_key": "remove it: each run has a key of its own, which it keeps when it is continued",
    "comet.mode": "remove it: a run that is continued continues its experiment",
    "csv_monitor.output_path": "remove it: the files are in the folder csv of the run's output_dir",
    "csv_monitor.job_name": "remove it: the files are in the folder csv of the run's output_dir",
    "checkpoint.use_node_local_storage": "remove it: checkpoint.storage of the run config owns it",
    "checkpoint.load_universal": "remove it: universal checkpoints are made and loaded as needed",
}
"""Names of DeepSpeed's that are not taken, and what to do."""

_PRECISIONS = {
    "fp32, fp16 or bf16": ("fp32", "fp16", "bf16"),
    "a precision like fp32, fp16 or bf16": ("fp32", "fp16", "bf16", "float32", "float16", "bfloat16"),
}
_TYPES: dict[str, tuple[type, ...]] = {
    "true or false": (bool,),
    "a whole number": (int,),
    "a number": (int, float),
    'an object like {"enabled": true}': (dict,),
    'an object like {"stage": 1}': (dict,),
    'an object like {"device": "cpu"}': (dict, type(None)),
    "an object": (dict,),
}
VALUES = {
    key: kind
    for kind, keys in {
        "true or false": """
            zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients wall_clock_breakdown dump_state
            memory_breakdown bf16.enabled bf16.check_grad_overflow fp16.enabled torch_autocast.enabled wandb.enabled
            comet.enabled csv_monitor.enabled""",
        "a whole number": f"""
            train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print
            {ZERO}.stage""",
        "a number": "gradient_clipping gradient_predivide_factor",
        "fp32, fp16 or bf16": "communication_data_type",
        "a precision like fp32, fp16 or bf16": """
            data_types.grad_accum_dtype data_types.param_dtype data_types.buffer_dtype
            torch_autocast.dtype""",
        'an object like {"enabled": true}': "bf16 fp16 wandb comet csv_monitor",
        'an object like {"stage": 1}': ZERO,
        'an object like {"device": "cpu"}': f"{ZERO}.offload_param {ZERO}.offload_optimizer",
        "an object": """
            data_types comms_logger flops_profiler aio checkpoint torch_autocast compile timers hybrid_engine""",
    }.items()
    for key in keys.split()
}
"""What each value must be that DeepSpeed, or this code, would take as it is."""
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""Values that may be "auto", since the run config decides them."""

Check = Callable[[dict[str, Any]], Iterable[tuple[str, str]]]
"""Yields (dotted name, what is wrong with it) for a whole file, whose values may be of any type."""


def load_ds_config(path: Path, *checks: Check) -> dict[str, Any]:
    """Reads and checks the JSON. checks: find what else is wrong in it; of one name the first problem is named. Raises
    SettingsError that names file, lines, keys and remedies."""
    source = str(path)
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in FOLDER.glob("*.json")))
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"deepspeed_config={source!r}: {what}; shipped in {FOLDER}: {shipped}")
    text = read_text(path)
    if not text.strip():
        raise SettingsError([Problem("is empty; write {} to use the defaults", source=source)])
    values = _parsed(text, source)
    walk = _Walk(source)
    node = compose(text, source)
    if isinstance(node, yaml.MappingNode):
        walk.check(node, values, "")
        for check in checks:
            named = {problem.key for problem in walk.problems}
            for key, what in check(values):
                if key not in named:
                    walk.add_problem(key, what)
    else:
        walk.add_problem("", "the top level must be a JSON object")
    refuse(sorted(walk.problems, key=lambda one: one.line))
    return dict(values)


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not valid JSON ({error.msg}); JSON allows no comments, and no comma before a closing bracket"
        raise SettingsError([Problem(what, source=source, line=error.lineno)]) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError([Problem(f"not valid JSON ({error})", source=source)]) from None


def section(values: Any, *names: str) -> dict[str, Any]:
    """Returns an object of the file by the names of those around it and its own; empty where there is none."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


class _Walk:
    """A walk over all of a file, and what is wrong in it."""

    def __init__(self, source: str) -> None:
        self.problems: list[Problem] = []
        self._source = source
        self._lines: dict[str, int] = {}

    def add_problem(self, key: str, what: str) -> None:
        self.problems.append(Problem(what, key=key, source=self._source, line=self._lines.get(key, 0)))

    def check(self, node: yaml.Node, value: Any, key: str) -> None:
        """Checks a value and all inside of it. key: its dotted name; empty: the file."""
        if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
            entries = Entries(node, self._source, key)
            self.problems += entries.problems
            for name, name_node, inner in entries:
                full = f"{key}.{name}" if key else name
                self._lines[full] = line_of(name_node)
                if problem := _wrong_name(name, key):
                    self.add_problem(full, problem)
                else:
                    self.check(inner, value.get(name), full)
        elif isinstance(node, yaml.SequenceNode) and isinstance(value, list):
            for one, inner_value in zip(node.value, value, strict=True):
                self.check(one, inner_value, key)
        elif isinstance(value, float) and not math.isfinite(value):
            self.add_problem(key, f"{key} is not a finite number; write one")
        is_auto = key in OWNED and value == "auto"
        if key in VALUES and not is_auto and not _is(value, VALUES[key]):
            self.add_problem(key, f"{key}={json.dumps(value)} must be {VALUES[key]}")


def _is(value: Any, kind: str) -> bool:
    return value in _PRECISIONS[kind] if kind in _PRECISIONS else type(value) in _TYPES[kind]


def _wrong_name(name: str, place: str) -> str | None:
    """Returns what is wrong with a name in an object; None: nothing."""
    full = f"{place}.{name}" if place else name
    if full in REMEDIES:
        return f"{full}: {REMEDIES[full]}"
    if place not in NAMES or name in NAMES[place]:
        return None
    return f"unknown key {full!r}; {_likely_name(name, place)}"


def _likely_name(name: str, place: str) -> str:
    homes = [home or "the top level" for home, names in NAMES.items() if name in names]
    if homes:
        return f"it belongs in {' or '.join(homes)}"
    for key, remedy in REMEDIES.items():
        if key.rpartition(".")[2] == name:
            return remedy
    close = difflib.get_close_matches(name.lower(), NAMES[place], n=1)
    return f"did you mean {close[0]!r}?" if close else "DeepSpeed would ignore it or fail; remove it"
