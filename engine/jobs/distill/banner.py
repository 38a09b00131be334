"""The start-up banner: what will be computed, on what, and an honest word on what is slower than it could be."""

from __future__ import annotations

import psutil

from engine.config.distill import TrainConfig
from engine.jobs.distill.memory import estimate_memory
from engine.jobs.distill.module import DistilModule
from engine.jobs.distill.plan import Plan
from engine.jobs.execution import compute_device, versions
from engine.losses.measure import Measured
from engine.mapping import mapping_table
from engine.models.capture import FULL_FROM
from engine.models.projections import Projections
from engine.models.teacher import FrozenTeacher
from engine.records.columns import counted, labelled_lines
from engine.records.records import final_result, read_records
from engine.records.run_dir import RunDir, tag_step
from engine.train.checkpoint import Chosen
from engine.train.optim import ChosenOptimizer, parameters_of


def describe_pads(plan: Plan, *, teacher: bool, student: bool) -> str:
    """Returns which models run without pads, and why not. teacher, student: whether they can."""
    if not plan.unpadded:
        why = "which loss.preset=tinybert counts" if plan.config.kernels.unpadded else "as kernels.unpadded=false says"
        return f"every batch runs with its padding, {why}"
    unpadded = [name for name, runs in (("teacher", teacher), ("student", student)) if runs]
    if not unpadded:
        return "every batch runs with its padding: neither model computes the same without it"
    only = f"only the {unpadded[0]} (the other would compute something else) runs"
    who = "both models run" if len(unpadded) == 2 else only
    return f"{who} without padding in batches that are less than {FULL_FROM[compute_device().type]:.0%} full"


def describe_start(plan: Plan, projections: Projections, measured: Measured | None) -> list[str]:
    """Returns what the projections start as, and by what terms are divided. measured: None where a checkpoint has
    it."""
    loss, pairs = plan.config.loss, plan.losses.state_pairs
    if measured is None:
        return ["projections and scales from the checkpoint"]
    lines = []
    trained = projections.trained
    if plan.trained_projections is not None:
        others = [name for name in projections.linears if name not in trained]
        lines.append(f"projections taken from {plan.trained_projections}: {', '.join(sorted(trained)) or 'none'}")
        if others:
            lines[-1] += f"; new: {', '.join(others)} (another name or shape there)"
    if pairs:
        kind = "fitted" if loss.fits_projections else "random"
        kind = "these" if trained and trained == frozenset(projections.linears) else kind
        what = "the identity explains" if plan.projection == "identity" else f"{kind} projections explain"
        shares = ", ".join(f"{pair} {share:.1%}" for pair, share in measured.explained.items())
        basis = f"{measured.tokens:,} tokens"
        basis += f"; {measured.left_out:,} without finite states left out" if measured.left_out else ""
        shares = shares or "none, since no state is finite"
        lines.append(f"share of the teacher's variance that {what} at the start: {shares} ({basis})")
    if measured.scales:
        names = ", ".join(dict.fromkeys(term.partition("/")[0] for term in measured.scales))
        lines.append(f"{names}: each term is divided by the variance of its target")
    return lines


def describe_continuing(chosen: Chosen | None, run_dir: RunDir, train: TrainConfig) -> str:
    """Returns what a start goes on from, and that nothing is left to do where that is so. chosen: its checkpoint."""
    if chosen is None:
        return "fresh"
    step = tag_step(chosen.tag)
    if step >= train.steps:
        return (
            f"{chosen.tag} is the last step, so the run is finished; to train longer, set more train.steps and "
            "accept_changes=true"
        )
    result = final_result(read_records(run_dir.records)) if run_dir.records.is_file() else None
    is_end = result is not None and result.get("steps_run") == step and not chosen.changes
    waited = result["bad_evaluations"] if result is not None and is_end else 0
    if train.patience is not None and waited >= train.patience:
        return f"{chosen.tag} ended early, so the run is finished; to train longer, set more train.patience"
    converted = f", {chosen.conversion}" if chosen.conversion else ""
    changed = f", from here on with {'; '.join(chosen.changes)}" if chosen.changes else ""
    return f"continues from {chosen.tag}{converted}{changed}"


def describe_run(
    plan: Plan,
    *,
    teacher: FrozenTeacher,
    module: DistilModule,
    measured: Measured | None,
    optimizer: ChosenOptimizer,
    epoch_sequences: int,
    device: str,
    start: str,
) -> str:
    """Returns the whole banner. measured: None where a checkpoint has it. device, start: what its rows say."""
    cfg, ex = plan.config, plan.execution
    rows: list[tuple[str, str | list[str]]] = [
        ("versions", versions()),
        ("teacher", _teacher_lines(plan, teacher)),
        ("student", _student_lines(plan, module)),
        ("mapping", mapping_table(plan.hidden_map, plan.attention_map)),
        (
            "losses",
            [
                ", ".join(f"{name} {weight:g}" for name, weight in plan.loss_weights.items())
                + f"; preset {cfg.loss.preset}, projection {plan.projection}",
                *describe_start(plan, module.projections, measured),
                *(
                    f"{name} trains {parameters_of(head) / 1e6:.2f} M parameters of its own, which are not exported"
                    for name, head in module.heads.items()
                ),
            ],
        ),
        (
            "corpus",
            f"{cfg.data.path}: {epoch_sequences:,} sequences an epoch, {plan.seq_len} tokens "
            f"({plan.manifest.fill:.0%} filled), {cfg.data.eval_sequences} held out",
        ),
        ("batch", _batch_line(plan, epoch_sequences)),
        ("stopping", describe_stopping(plan)),
        ("execution", f"{ex.precision}, ZeRO stage {ex.zero_stage} ({ex.source}), {device}"),
        ("optimizer", str(optimizer)),
        (
            "kernels",
            [
                plan.kernels.describe(cfg.loss.active),
                describe_pads(plan, teacher=teacher.unpadded, student=module.unpadded),
            ],
        ),
        ("memory", _memory(plan, teacher, parameters_of(module))),
        ("start", start),
        ("output", cfg.output_dir),
    ]
    rows += [("trackers", ", ".join(ex.trackers))] if ex.trackers else []
    rows += [("warning", text) for text in plan.warnings]
    return labelled_lines(rows) + "\n"


def _teacher_lines(plan: Plan, teacher: FrozenTeacher) -> list[str]:
    config, shape = plan.config.teacher, plan.teacher_shape
    fewer = "" if teacher.layers_loaded == shape.layers else f" ({teacher.layers_loaded} of them loaded and run)"
    return [
        f"{config.path}: {plan.teacher.config.model_type}, {shape.layers} layers{fewer}, width {shape.width}, "
        f"{shape.heads} heads, {teacher.parameters_count / 1e6:.1f} M parameters, {plan.teacher_dtype}, "
        f"{config.placement}",
        f"attention {plan.teacher_attention.name} ({plan.teacher_attention.reason})",
    ]


def _student_lines(plan: Plan, module: DistilModule) -> list[str]:
    config, shape = plan.config.student, plan.student_shape
    origin = config.path or f"init {config.init or 'random'}"
    parameters, projections = parameters_of(module.student), parameters_of(module.projections)
    vectors = [] if plan.sentence is None else [f"exported as a sentence encoder: {plan.sentence}"]
    return [
        f"{origin}: {plan.student_config.model_type}, {shape.layers} layers, width {shape.width}, {shape.heads} heads, "
        f"{parameters / 1e6:.1f} M parameters + {projections / 1e6:.2f} M in projections",
        f"attention {plan.student_attention.name} ({plan.student_attention.reason})",
        *vectors,
    ]


def _batch_line(plan: Plan, epoch_sequences: int) -> str:
    train, ex = plan.config.train, plan.execution
    sequences = train.steps * train.global_batch
    return (
        f"{train.global_batch} sequences = {ex.micro_batch_size} micro batch x {ex.grad_accum_steps} accumulation x "
        f"{counted(ex.world_size, 'rank')}; {counted(train.steps, 'step')} = {sequences * plan.seq_len / 1e6:.2f} M "
        f"positions = {sequences / epoch_sequences:.2f} epochs"
    )


def _memory(plan: Plan, teacher: FrozenTeacher, parameters: int) -> str:
    estimate = estimate_memory(plan, teacher, parameters)
    if compute_device().type == "cuda":
        return estimate.on_gpu()
    return estimate.in_process(resident=psutil.Process().memory_info().rss, parameters=parameters)


def describe_stopping(plan: Plan) -> str:
    """Returns when training ends before its last step, and which step is exported."""
    train = plan.config.train
    every = "step" if train.eval_every == 1 else f"{train.eval_every} steps"
    measures = train.eval_every and plan.config.data.eval_sequences
    when = f"held-out loss every {every}" if measures else "no held-out loss"
    if not train.keeps_best:
        return f"none; {when}, the last step is exported"
    if train.patience is None:
        return f"none; {when}, the best step is exported"
    by = f" by more than {train.patience_threshold:g}" if train.patience_threshold else ""
    evaluations = counted(train.patience, "evaluation")
    return f"after {evaluations} without a better one{by} ({when}); the best step is exported"
