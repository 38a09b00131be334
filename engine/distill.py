"""The main job: assembles teacher, student, losses, corpus and DeepSpeed engine from a plan, runs it, exports."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from engine import banner, runtime
from engine.checkpoint import Checkpointer
from engine.config import RunConfig
from engine.data.batch import Batch, Counts
from engine.data.loader import CorpusLoader
from engine.distil_module import DistilModule
from engine.errors import UserError
from engine.export import export_checkpoint
from engine.losses.loss_set import LossSet
from engine.models.attention import resolve_backend
from engine.models.flops import forward_flops_per_token
from engine.models.projections import Projections
from engine.models.student import build_student
from engine.models.teacher import FrozenTeacher
from engine.monitor import Monitor, StepReport, peak_memory_gib
from engine.optim import ChosenOptimizer, build_optimizer, build_schedule, initialize_engine
from engine.plan import Plan, describe_for_export, identity, make_plan
from engine.run_dir import RunDir, step_tag
from engine.timing import PhaseTimer
from engine.trainer import Outcome, Trainer

EXIT_BY_OUTCOME = {Outcome.DONE: 0, Outcome.DIVERGED: 3, Outcome.PREEMPTED: 4}


class DistillationTask:
    """One forward pass of a distillation: the teacher's, then the student's with all losses."""

    def __init__(self, teacher: FrozenTeacher, ds_engine: Any, losses: LossSet) -> None:
        self._teacher = teacher
        self._ds_engine = ds_engine
        self.term_names = losses.term_names
        self.coefficients = losses.coefficients

    def forward(self, batch: Batch, per_micro: Counts, timer: PhaseTimer) -> tuple[torch.Tensor, torch.Tensor]:
        with timer.phase("teacher"):
            features = self._teacher(batch)
        with timer.phase("student"):
            total, terms = self._ds_engine(batch, features, per_micro)
        return total, terms


def distill(config: RunConfig) -> int:
    """Runs or continues the distillation; returns the exit code."""
    plan = make_plan(config)
    run_dir = RunDir(Path(config.output_dir))
    checkpointer = Checkpointer(
        run_dir=run_dir,
        execution=plan.execution,
        identity=identity(plan),
        export={},
        keep=config.train.keep,
        is_rank_zero=runtime.launcher_rank() == 0,
    )
    tag = checkpointer.choose(config.resume)
    stop = runtime.StopRequest()
    here = runtime.start(config.seed)
    try:
        return Job(plan, run_dir, checkpointer, here, stop).run(tag)
    finally:
        torch.distributed.destroy_process_group()


class Job:
    """One start of a run on this rank."""

    def __init__(
        self, plan: Plan, run_dir: RunDir, checkpointer: Checkpointer, here: runtime.Runtime, stop: runtime.StopRequest
    ) -> None:
        self.plan, self.run_dir, self.checkpointer, self.here, self.stop = plan, run_dir, checkpointer, here, stop
        self.config = plan.config

    def run(self, tag: str | None) -> int:
        plan = self.plan
        self._prepare_folder(tag)
        teacher = self._load_teacher()
        module, chosen = self._build_module()
        loader = self._open_corpus()
        self.checkpointer = replace(self.checkpointer, export=describe_for_export(plan, module.student.config))
        if self.here.is_rank_zero:
            print(self._banner(teacher, module, chosen, loader.order.slots, tag), flush=True)
        if self.config.dry_run:
            return 0
        schedule = build_schedule(self.config.train, chosen.optimizer)
        ds_engine = initialize_engine(module, chosen.optimizer, schedule, self.plan.execution)
        step = self.checkpointer.load(ds_engine, tag) if tag is not None else 0
        monitor = self._open_monitor(teacher, module)
        trainer = Trainer(
            config=self.config,
            execution=self.plan.execution,
            runtime=self.here,
            ds_engine=ds_engine,
            task=DistillationTask(teacher, ds_engine, self.plan.losses),
            loader=loader,
            checkpointer=self.checkpointer,
            monitor=monitor,
            stop=self.stop,
            step=step,
        )
        monitor.write_record("run", status="started", step=step, resumed_from=tag, **self._facts())
        try:
            outcome = trainer.train()
            self._finish(outcome, trainer.step, monitor)
        finally:
            monitor.close()
        return EXIT_BY_OUTCOME[outcome]

    def _prepare_folder(self, tag: str | None) -> None:
        """Writes the resolved configuration (rank 0); nothing of a dry run is left behind."""
        if not self.here.is_rank_zero or self.config.dry_run:
            return
        try:
            self.run_dir.root.mkdir(parents=True, exist_ok=True)
            self.run_dir.config.write_text(self.config_text, encoding="utf-8")
            self.run_dir.ds_config.write_text(
                json.dumps(self.plan.execution.resolved, indent=2) + "\n", encoding="utf-8"
            )
            self.plan.tokenizer.save_pretrained(self.run_dir.tokenizer)
        except OSError as error:
            raise UserError(f"output_dir={self.config.output_dir!r} cannot be written: {error}") from None
        for name in self.checkpointer.clean():
            print(f"removed {name}: an unfinished checkpoint")
        for name in self.checkpointer.set_aside_after(tag) if tag is not None else ():
            print(f"renamed {name} to superseded-{name}: the run continues from {tag}")

    @property
    def config_text(self) -> str:
        return yaml.safe_dump(asdict(self.config), sort_keys=False)

    def _load_teacher(self) -> FrozenTeacher:
        cfg, plan = self.config.teacher, self.plan
        dtype = getattr(torch, plan.teacher_dtype)
        shape = plan.teacher_shape
        self.teacher_attention = banner.Attention(
            *resolve_backend(
                cfg.attention,
                device=self.here.device,
                dtype=dtype,
                seq_len=plan.seq_len,
                head_dim=shape.width // shape.heads,
                training=False,
                key="teacher.attention",
            )
        )
        return FrozenTeacher.load(
            cfg.path,
            wanted=plan.losses.wanted_teacher,
            dtype=dtype,
            device=self.here.device,
            backend=self.teacher_attention.name,
            placement=cfg.placement,
        )

    def _build_module(self) -> tuple[DistilModule, ChosenOptimizer]:
        plan = self.plan
        shape = plan.student_shape
        self.student_attention = banner.Attention(
            *resolve_backend(
                self.config.student.attention,
                device=self.here.device,
                dtype=getattr(torch, plan.execution.precision),
                seq_len=plan.seq_len,
                head_dim=shape.width // shape.heads,
                key="student.attention",
            )
        )
        torch.manual_seed(self.config.seed)
        student = build_student(
            self.config.student,
            teacher_path=self.config.teacher.path,
            teacher_config=plan.teacher_config,
            hidden_map=plan.hidden_map,
            with_mlm_head=plan.mlm_head,
            seed=self.config.seed,
            backend=self.student_attention.name,
        )
        torch.manual_seed(self.config.seed + 1)  # the projections do not depend on how the student was initialised
        projections = Projections(
            self.config.loss,
            student_width=shape.width,
            teacher_width=plan.teacher_shape.width,
            layers=plan.losses.projected_layers,
        )
        module = DistilModule(student, projections, plan.losses).to(self.here.device)
        chosen = build_optimizer(
            self.config.optim, module, lr=self.config.train.lr, execution=plan.execution, device=self.here.device
        )
        if self.config.require_fused and chosen.why_not_faster:
            raise UserError(f"require_fused=true, but {chosen.why_not_faster}")
        return module, chosen

    def _open_corpus(self) -> CorpusLoader:
        return CorpusLoader(
            Path(self.config.data.path),
            seq_len=self.plan.seq_len,
            eval_sequences=self.config.data.eval_sequences,
            seed=self.config.seed,
            global_batch=self.config.train.global_batch,
            micro_batch=self.plan.execution.micro_batch_size,
            rank=self.here.rank,
            world=self.here.world_size,
            mlm_probability=self.config.data.mlm_probability,
            whole_word=self.config.data.whole_word_mask,
            tokenizer=self.plan.tokenizer,
        )

    def _banner(
        self, teacher: FrozenTeacher, module: DistilModule, chosen: ChosenOptimizer, epoch: int, tag: str | None
    ) -> str:
        optimizer = chosen.name + (f"; {chosen.why_not_faster}" if chosen.why_not_faster else "")
        return banner.start(
            self.plan,
            teacher=teacher,
            teacher_attention=self.teacher_attention,
            student_parameters=count_parameters(module.student),
            student_attention=self.student_attention,
            projection_parameters=count_parameters(module.projections),
            optimizer=optimizer,
            epoch_sequences=epoch,
            device=f"{self.here.device}, {self.here.threads} threads",
            start=f"continues from {tag}" if tag else "fresh",
        )

    def _facts(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "mapping": {"hidden": str(plan.hidden_map), "attention": str(plan.attention_map)},
            "world_size": plan.execution.world_size,
            "zero_stage": plan.execution.zero_stage,
            "precision": plan.execution.precision,
            "steps": self.config.train.steps,
            "seed": self.config.seed,
        }

    def _open_monitor(self, teacher: FrozenTeacher, module: DistilModule) -> Monitor:
        return Monitor(
            active=self.here.is_rank_zero,
            tensorboard=self.run_dir.tensorboard,
            records=self.run_dir.records,
            steps=self.config.train.steps,
            flops_per_token=self._flops_per_token(teacher, module),
            device=self.here.device,
            config_text=self.config_text,
        )

    def _flops_per_token(self, teacher: FrozenTeacher, module: DistilModule) -> float:
        """Teacher forward + 3 x (student forward + projections): a backward pass costs twice its forward. Counted as
        FrozenTeacher.flops_per_token says; losses, embeddings look-ups and the optimizer are left out."""
        plan = self.plan
        student = forward_flops_per_token(module.student, plan.student_shape, plan.seq_len)
        used = len(plan.losses.projected_layers) if plan.config.loss.resolved_projection != "identity" else 0
        projections = 2.0 * used * plan.student_shape.width * plan.teacher_shape.width
        return teacher.flops_per_token(plan.seq_len) + 3.0 * (student + projections)

    def _finish(self, outcome: Outcome, step: int, monitor: Monitor) -> None:
        """Exports and says how it ended (rank 0)."""
        if not self.here.is_rank_zero:
            return
        if outcome is Outcome.DIVERGED:
            return  # the monitor has said it
        if outcome is Outcome.PREEMPTED:
            monitor.write_record("run", status="preempted", step=step, signal=self.stop.signal)
            monitor.say(f"stopped by a signal after step {step}; the same command continues from there")
            return
        export_checkpoint(self.run_dir, step_tag(step), self.run_dir.student)
        first, last = monitor.first, monitor.last
        monitor.write_record(
            "result",
            status="done",
            step=step,
            losses=last.by_loss() if last else None,
            total=last.total if last else None,
            held_out=monitor.last_held_out,
            tokens_per_s=monitor.tokens_per_s,
            peak_memory_gib=peak_memory_gib(self.here.device),
            student=str(self.run_dir.student),
            **{k: v for k, v in self._facts().items() if k != "steps"},
        )
        if first is not None and last is not None:
            monitor.say("\n" + self._closing_table(first, last, monitor))

    def _closing_table(self, first: StepReport, last: StepReport, monitor: Monitor) -> str:
        peak = peak_memory_gib(self.here.device)
        facts = [
            (
                "speed",
                f"{monitor.tokens_per_s:,.0f} tokens/s over {self.here.world_size} rank(s), peak {peak:.2f} GiB",
            ),
            ("student", f"{self.run_dir.student}   (AutoModel.from_pretrained)"),
            ("checkpoint", str(self.run_dir.checkpoints / step_tag(last.step))),
            ("tensorboard", f"tensorboard --logdir {self.run_dir.tensorboard}"),
        ]
        if monitor.last_held_out is not None:
            facts.insert(
                0, ("held out", f"loss {monitor.last_held_out['total']:.4g} at step {monitor.last_held_out['step']}")
            )
        return banner.closing_table(
            {"total": first.total, **first.by_loss()},
            {"total": last.total, **last.by_loss()},
            facts,
            steps=(first.step, last.step),
        )


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
