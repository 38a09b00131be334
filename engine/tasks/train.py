"""One fine-tuning: trains a module on an encoded task and scores it. Needs no files: a process can make many."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, cast

from engine.config.deepspeed import Execution
from engine.config.distill import OptimConfig, TrainConfig, decay_steps
from engine.config.finetune import FineTrainConfig
from engine.data.share import StepShare
from engine.losses.measure import Learner, Measured, TeacherSlice, begin, sequences_of
from engine.ranks.runtime import Runtime, StopRequest
from engine.tasks.encode import EncodedTask
from engine.tasks.evaluation import TaskEvaluation
from engine.tasks.loader import TaskLoader, steps_for
from engine.tasks.module import TaskModule
from engine.train.checkpoint import Checkpointer, Chosen
from engine.train.deepspeed_engine import DeepSpeedModel
from engine.train.monitor import Monitor
from engine.train.optim import ChosenOptimizer, choose_optimizer
from engine.train.trainee import Trainee
from engine.train.trainer import Outcome, Teacher, Trainer


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a module is trained on a task, and how often it is scored."""

    train: TrainConfig
    optim: OptimConfig
    execution: Execution
    """Resolved for train.global_batch."""
    seed: int
    """Seed of dropout and of the order of the rows."""
    eval_every: int | None = None
    """Optimizer steps between scores; None: once per epoch. One more comes at the end."""
    patience: int | None = None
    """Scores without a better one after which training ends and the best weights count; None: all steps, the last."""
    require_fused: bool = False


@dataclass(frozen=True)
class Checkpoints:
    """Where the checkpoints of a fine-tuning go, and the one that it continues from."""

    checkpointer: Checkpointer
    chosen: Chosen | None
    """None: training starts from the module's weights."""


@dataclass(frozen=True)
class TaskResult:
    outcome: Outcome
    step: int
    """Optimizer step of the kept weights: with patience the best one, else the last."""
    steps_run: int
    """Optimizer step at which training ended."""
    score: float | None
    """Score of the dev splits in [0, 1] (or [-1, 1]); None unless the outcome is DONE."""
    metrics: dict[str, float]
    optimizer: str


def task_train_config(
    rows: int,
    *,
    epochs: float,
    lr: float,
    batch: int,
    warmup_share: float = 0.1,
    settings: FineTrainConfig | None = None,
) -> TrainConfig:
    """Returns a schedule that sees every row `epochs` times, and warms up for a share of its steps (both rounded up).

    settings: kind of schedule, clipping, logging and saving; None: the defaults.
    """
    settings = settings or FineTrainConfig()
    steps = steps_for(rows, epochs=epochs, global_batch=batch)
    warmup = math.ceil(Fraction(str(warmup_share)) * steps)
    if settings.schedule == "warmup_stable_decay":  # both are rounded up
        warmup = min(warmup, steps - decay_steps(settings.decay_share, steps))
    return TrainConfig(
        steps=steps,
        global_batch=batch,
        lr=lr,
        warmup_steps=warmup,
        schedule=settings.schedule,
        decay_share=settings.decay_share,
        grad_clip=settings.grad_clip,
        log_every=min(settings.log_every, steps),
        eval_every=0,
        save_every=settings.save_every,
        keep=1,
    )


def train_on_task(
    module: TaskModule,
    task: EncodedTask,
    recipe: Recipe,
    *,
    runtime: Runtime,
    stop: StopRequest,
    monitor: Monitor,
    checkpoints: Checkpoints | None = None,
    teacher: Teacher | None = None,
) -> TaskResult:
    """Trains from the module's weights, or from the chosen checkpoint, to the end (or until `stop`). Collective.

    The module is trained in place and cannot be trained again; everything that DeepSpeed holds of it is given back.
    With patience, the score is that of the best evaluation, whose weights a checkpointer keeps. The caller closes the
    monitor. Raises what the trainer raises, and UserError where a required fused optimizer is missing.
    """
    chosen = None if checkpoints is None else checkpoints.chosen
    loader = _loader(module, task, recipe, runtime)
    measured = Measured()
    if chosen is None and module.losses is not None and module.losses.looks_at_slice:
        assert teacher is not None
        rows = loader.first_batches(sequences_of(module.losses.config, task.mean_tokens))
        measured = begin(cast(Learner, module), TeacherSlice(rows, teacher, runtime.device, module.losses.teacher))
    optimizer = choose_optimizer(
        module, recipe.optim, recipe.train, recipe.execution, runtime.device, require_fused=recipe.require_fused
    )
    model = DeepSpeedModel(module, optimizer.optimizer, recipe.train, recipe.execution)
    try:
        state: dict[str, Any] = {"step": 0}
        if checkpoints is not None and chosen is not None:
            state = checkpoints.checkpointer.load(model, chosen)
            measured = Measured(**state["measured"])
            if module.losses is not None:
                module.losses = module.losses.scaled(measured.scales)
        trainee = Trainee(
            model,
            train=recipe.train,
            terms=module,
            execution=recipe.execution,
            runtime=runtime,
            monitor=monitor,
            sequence_ids=loader.sequence_ids,
            checkpointer=None if checkpoints is None else checkpoints.checkpointer,
            kept={"measured": asdict(measured)},
        )
        evaluation = _evaluation(trainee, task, recipe)
        if chosen is not None:
            evaluation.restore(state)
        trainer = Trainer(
            train=recipe.train,
            seed=recipe.seed,
            runtime=runtime,
            stop=stop,
            trainees=[trainee],
            teacher=teacher,
            loader=loader,
            evaluation=evaluation,
            step=state["step"],
        )
        return _result(trainer.run(), trainer.step, evaluation, optimizer)
    finally:
        model.release()
        del model
        gc.collect()  # engine and optimizer refer to each other


def _loader(module: TaskModule, task: EncodedTask, recipe: Recipe, runtime: Runtime) -> TaskLoader:
    micro_batch = recipe.execution.micro_batch_size
    return TaskLoader(
        task.train,
        StepShare(recipe.train.global_batch, micro_batch, rank=runtime.rank, world=runtime.world_size),
        pad_id=task.pad_id,
        seed=recipe.seed,
        pin_memory=runtime.device.type == "cuda",
        windows=() if module.losses is None else module.losses.windows,
    )


def _evaluation(trainee: Trainee, task: EncodedTask, recipe: Recipe) -> TaskEvaluation:
    return TaskEvaluation(
        trainee,
        task,
        batch_size=2 * recipe.execution.micro_batch_size,  # no gradients: half the memory a row, and fewer forwards
        global_batch=recipe.train.global_batch,
        every=recipe.eval_every,
        patience=recipe.patience,
    )


def _result(outcome: Outcome, step: int, evaluation: TaskEvaluation, optimizer: ChosenOptimizer) -> TaskResult:
    done, best = outcome is Outcome.DONE, evaluation.best
    return TaskResult(
        outcome=outcome,
        step=best.step if done else step,
        steps_run=step,
        score=best.score if done else None,
        metrics=best.metrics if done else {},
        optimizer=str(optimizer),
    )
