"""The main job: assembles teacher, student, losses, corpus and DeepSpeed engine from a plan, runs it, exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine import banner, runtime
from engine.assemble import build_module, flops_per_token, load_teacher, open_corpus, parameters_of, start_engine
from engine.checkpoint import Checkpointer
from engine.config import RunConfig
from engine.data.loader import CorpusLoader
from engine.distil_module import DistilModule
from engine.export import export_checkpoint
from engine.held_out import HeldOutLosses
from engine.models.teacher import FrozenTeacher
from engine.monitor import History, Monitor
from engine.optim import ChosenOptimizer
from engine.plan import Plan, describe_for_export, identity, make_plan
from engine.run_dir import RunDir, as_yaml, step_tag
from engine.trainer import Outcome, Trainee, Trainer


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
    loader = open_corpus(plan)
    if checkpointer.is_rank_zero and not config.dry_run:
        run_dir.write_settings(config, ds_config=plan.execution.resolved, tokenizer=plan.tokenizer)
    here = runtime.start(config.seed)
    code = Job(plan, run_dir, checkpointer, here, loader).run(tag)
    torch.distributed.destroy_process_group()  # not after an exception: it could wait for ranks that are gone
    return code


class Job:
    """One start of a run on this rank."""

    def __init__(
        self, plan: Plan, run_dir: RunDir, checkpointer: Checkpointer, here: runtime.Runtime, loader: CorpusLoader
    ) -> None:
        self.plan, self.run_dir, self.checkpointer, self.here, self.loader = plan, run_dir, checkpointer, here, loader
        self.config = plan.config

    def run(self, tag: str | None) -> int:
        plan = self.plan
        if self.here.is_rank_zero and not self.config.dry_run:
            self._tidy(tag)
        teacher = load_teacher(plan, plan.losses.wanted_teacher, self.here.device)
        module, chosen = build_module(plan, self.here.device)
        self.checkpointer = replace(self.checkpointer, export=describe_for_export(plan, module.student.config))
        if self.here.is_rank_zero:
            print(self._banner(teacher, module, chosen, tag), flush=True)
        if self.config.dry_run:
            return 0
        monitor = self._open_monitor(flops_per_token(plan, teacher, module))
        ds_engine = start_engine(module, chosen, self.config.train, plan.execution)
        step = self.checkpointer.load(ds_engine, tag)["step"] if tag is not None else 0
        trainee = Trainee(
            ds_engine,
            term_names=plan.losses.term_names,
            coefficients=plan.losses.coefficients,
            observed_names=plan.losses.observed_names,
            execution=plan.execution,
            runtime=self.here,
            monitor=monitor,
            checkpointer=self.checkpointer,
        )
        agreement = runtime.Agreement()
        trainer = Trainer(
            train=self.config.train,
            seed=self.config.seed,
            execution=plan.execution,
            runtime=self.here,
            agreement=agreement,
            stop=runtime.StopRequest(),  # not before: until here a signal may simply end the process
            trainees=[trainee],
            teacher=teacher,
            loader=self.loader,
            evaluation=HeldOutLosses(trainee, teacher, self.loader, agreement, every=self.config.train.eval_every),
            step=step,
        )
        monitor.write_record(
            "run", status="started", step=step, resumed_from=tag, **self._facts(), steps=self.config.train.steps
        )
        try:
            outcome = trainer.run()
            self._finish(outcome, trainer, monitor)
        finally:
            monitor.close()
        return outcome.exit_code

    def _tidy(self, tag: str | None) -> None:
        """Puts what earlier starts left out of the way."""
        for name in self.checkpointer.clean():
            print(f"removed {name}: an unfinished checkpoint")
        for name in self.checkpointer.set_aside_after(tag) if tag is not None else ():
            print(f"renamed {name} to superseded-{name}: the run continues from {tag}")
        for path in self.run_dir.set_aside_logs() if tag is None else ():
            print(f"renamed {path.name} to superseded-{path.name}: the run starts anew")

    def _banner(self, teacher: FrozenTeacher, module: DistilModule, chosen: ChosenOptimizer, tag: str | None) -> str:
        optimizer = chosen.name + (f"; {chosen.why_not_faster}" if chosen.why_not_faster else "")
        return banner.start(
            self.plan,
            teacher=teacher,
            student_parameters=parameters_of(module.student),
            projection_parameters=parameters_of(module.projections),
            student_unpadded=module.unpadded,
            optimizer=optimizer,
            epoch_sequences=self.loader.order.slots,
            device=f"{self.here.device}, {self.here.threads} threads",
            start=f"continues from {tag}" if tag else "fresh",
        )

    def _facts(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "mapping": {"hidden": str(plan.hidden_map), "attention": str(plan.attention_map)},
            **plan.execution.facts,
            "seed": self.config.seed,
        }

    def _open_monitor(self, flops_per_token: float) -> Monitor:
        return Monitor(
            active=self.here.is_rank_zero,
            tensorboard=self.run_dir.tensorboard,
            records=self.run_dir.records,
            steps=self.config.train.steps,
            flops_per_token=flops_per_token,
            device=self.here.device,
            config_text=as_yaml(self.config),
        )

    def _finish(self, outcome: Outcome, trainer: Trainer, monitor: Monitor) -> None:
        """Exports and says how it ended (rank 0). What diverged has said so already."""
        if not self.here.is_rank_zero or outcome is Outcome.DIVERGED:
            return
        monitor.end_progress()
        if outcome is Outcome.PREEMPTED:
            monitor.write_record("run", status="preempted", step=trainer.step, signal=trainer.stop.signal)
            monitor.say(f"stopped by a signal after step {trainer.step}; the same command continues from there")
            return
        export_checkpoint(self.run_dir, step_tag(trainer.step), self.run_dir.student)
        history = monitor.history
        if not history.steps:  # records.jsonl was removed from a finished run
            monitor.say(f"finished before; student {self.run_dir.student}")
            return
        monitor.write_record(
            "result",
            status="done",
            step=trainer.step,
            losses=history.last["losses"],
            total=history.last["total"],
            held_out=history.held_out,
            tokens_per_s=history.tokens_per_s,
            peak_memory_gib=history.peak_memory_gib,
            student=str(self.run_dir.student),
            **self._facts(),
        )
        monitor.say("\n" + self._closing_table(history))

    def _closing_table(self, history: History) -> str:
        first, last, peak = history.first, history.last, history.peak_memory_gib
        facts = [
            ("speed", f"{history.tokens_per_s:,.0f} tokens/s over {self.here.world_size} rank(s), peak {peak:.2f} GiB"),
            ("student", f"{self.run_dir.student}   (AutoModel.from_pretrained)"),
            ("checkpoint", str(self.run_dir.checkpoints / step_tag(last["step"]))),
            ("tensorboard", f"tensorboard --logdir {self.run_dir.tensorboard}"),
        ]
        if history.held_out is not None:
            facts.insert(0, ("held out", f"loss {history.held_out['total']:.4g} at step {history.held_out['step']}"))
        return banner.closing_table(
            {"total": first["total"], **first["losses"]},
            {"total": last["total"], **last["losses"]},
            facts,
            steps=(first["step"], last["step"]),
        )
