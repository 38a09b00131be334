"""One fine-tuning: trains a module on an encoded task and scores it. Needs no files: a process can make many."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, cast

from engine.config.deepspeed import Execution
from engine.config.distill import OptimConfig, Schedule, TrainConfig, decay_steps
from engine.losses.loss_set import LossSet
from engine.losses.measure import Learner, Measured, TeacherSlice, begin, sequences_of
from engine.ranks.runtime import Runtime, StopRequest
from engine.tasks.encode import EncodedTask
from engine.tasks.evaluation import TaskEvaluation
from engine.tasks.loader import TaskLoader, steps_for
from engine.tasks.module import TaskModule
from engine.train.checkpoint import Checkpointer, Chosen
from engine.train.deepspeed_engine import DeepSpeedModel
from engine.train.monitor import Monitor
from engine.train.optim import choose_optimizer
from engine.train.trainee import Trainee
from engine.train.trainer import Outcome, Teacher, Trainer


@dataclass(frozen=True)
class TaskResult:
    outcome: Outcome
    step: int
    """Optimizer step of the kept weights: with patience the best one, else the last."""
    steps_run: int
    """Optimizer step at which training ended."""
    score: float | None
    """Of the dev splits in [0, 1] (or [-1, 1]); None unless the outcome is DONE."""
    metrics: dict[str, float]
    optimizer: str


def task_train_config(
    rows: int,
    *,
    epochs: float,
    lr: float,
    batch: int,
    warmup_share: float = 0.1,
    schedule: Schedule = "linear",
    decay_share: float | None = None,
    grad_clip: float = 1.0,
    log_every: int = 50,
    save_every: int = 0,
) -> TrainConfig:
    """The common schedule: steps that see every row `epochs` times (rounded up), the share of them to warm up."""
    steps = steps_for(rows, epochs=epochs, global_batch=batch)
    warmup = math.ceil(Fraction(str(warmup_share)) * steps)
    if schedule == "warmup_stable_decay":  # both are rounded up
        warmup = min(warmup, steps - decay_steps(decay_share, steps))
    return TrainConfig(
        steps=steps,
        global_batch=batch,
        lr=lr,
        warmup_steps=warmup,
        schedule=schedule,
        decay_share=decay_share,
        grad_clip=grad_clip,
        log_every=min(log_every, steps),
        eval_every=0,
        save_every=save_every,
        keep=1,
    )


def train_on_task(
    *,
    module: TaskModule,
    task: EncodedTask,
    train: TrainConfig,
    optim: OptimConfig,
    execution: Execution,
    runtime: Runtime,
    stop: StopRequest,
    seed: int,
    monitor: Monitor,
    checkpointer: Checkpointer | None = None,
    chosen: Chosen | None = None,
    teacher: Teacher | None = None,
    patience: int | None = None,
    eval_every: int | None = None,
    require_fused: bool = False,
) -> TaskResult:
    """Trains from the module's weights, or from the checkpoint `chosen`, to the end (or until `stop`). Collective.

    execution: resolved for train.global_batch. seed: order of the rows and dropout. The module is trained in place and
    cannot be trained again; everything that DeepSpeed holds of it is given back. With patience, the score is that of
    the best evaluation, whose weights a checkpointer keeps. The caller closes the monitor.
    """
    loader = _loader(task, seed, execution, runtime, train, module.losses)
    measured = Measured()
    if chosen is None and module.losses is not None and module.losses.looks_at_slice:
        assert teacher is not None
        rows = loader.first(sequences_of(module.losses.config, task.mean_tokens))
        measured = begin(cast(Learner, module), TeacherSlice(rows, teacher, runtime.device, module.losses.teacher))
    optimizer = choose_optimizer(module, optim, train, execution, runtime.device, require_fused=require_fused)
    model = DeepSpeedModel(module, optimizer.optimizer, train, execution)
    try:
        state: dict[str, Any] = {"step": 0}
        if checkpointer is not None and chosen is not None:
            state = checkpointer.load(model, chosen)
            measured = Measured(**state["measured"])
            if module.losses is not None:
                module.losses = module.losses.scaled(measured.scales)
        trainee = Trainee(
            model,
            train=train,
            terms=module,
            execution=execution,
            runtime=runtime,
            monitor=monitor,
            sequence_ids=loader.sequence_ids,
            checkpointer=checkpointer,
        )
        evaluation = TaskEvaluation(
            trainee,
            task,
            batch_size=2 * execution.micro_batch_size,  # no gradients: half the memory a row, and fewer forwards
            global_batch=train.global_batch,
            every=eval_every,
            patience=patience,
        )
        if chosen is not None:
            evaluation.restore(state)
        trainer = Trainer(
            train=train,
            seed=seed,
            runtime=runtime,
            stop=stop,
            trainees=[trainee],
            teacher=teacher,
            loader=loader,
            evaluation=evaluation,
            step=state["step"],
            kept={"measured": asdict(measured)},
        )
        outcome = trainer.run()
        done = outcome is Outcome.DONE
        return TaskResult(
            outcome=outcome,
            step=evaluation.best.step if done else trainer.step,
            steps_run=trainer.step,
            score=evaluation.best.score if done else None,
            metrics=evaluation.best.metrics if done else {},
            optimizer=str(optimizer),
        )
    finally:
        model.release()
        del model
        gc.collect()  # engine and optimizer refer to each other


def _loader(
    task: EncodedTask, seed: int, execution: Execution, runtime: Runtime, train: TrainConfig, losses: LossSet | None
) -> TaskLoader:
    return TaskLoader(
        task.train,
        pad_id=task.pad_id,
        seed=seed,
        global_batch=train.global_batch,
        micro_batch=execution.micro_batch_size,
        rank=runtime.rank,
        world=runtime.world_size,
        pin_memory=runtime.device.type == "cuda",
        windows=() if losses is None else losses.windows,
    )
