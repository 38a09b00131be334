"""The main job: assembles teacher, student, losses, corpus and DeepSpeed engine from a plan, runs it, exports."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.distill import RunConfig
from engine.config.places import command
from engine.data.loader import CorpusLoader
from engine.errors import RunFailure
from engine.jobs.distill import banner
from engine.jobs.distill.build import build_module, flops_per_token, load_teacher, open_corpus
from engine.jobs.distill.comparison import compare_with_teacher
from engine.jobs.distill.ending import describe_end
from engine.jobs.distill.held_out import HeldOutLosses
from engine.jobs.distill.module import DistilModule
from engine.jobs.distill.plan import Plan, describe_for_export, hyperparameters, identity, make_plan
from engine.losses.base import NO_LOSSES, OwnLosses
from engine.losses.measure import Measured, TeacherSlice, begin, sequences_of
from engine.models.teacher import FrozenTeacher
from engine.ranks import run_lock
from engine.ranks.collectives import from_rank_zero
from engine.ranks.run_lock import RunLock
from engine.ranks.runtime import Runtime, StopRequest, join_ranks, launcher_rank
from engine.records.records import OnRecord, final_result, read_records
from engine.records.run_dir import RunDir, as_yaml, step_tag
from engine.train.checkpoint import Checkpointer, Chosen
from engine.train.checkpoint_storage import storage_of
from engine.train.deepspeed_engine import DeepSpeedModel
from engine.train.export import export_live, is_export
from engine.train.monitor import Monitor
from engine.train.optim import ChosenOptimizer
from engine.train.trainee import Trainee
from engine.train.trainer import Outcome, Trainer


def distill(config: RunConfig, *, own_losses: OwnLosses = NO_LOSSES, on_record: OnRecord | None = None) -> None:
    """Runs or continues the distillation. Collective. Raises Diverged, Preempted, UserError and RunFailure.

    own_losses: losses beside those of the configuration, with their weights. on_record: is called with each record, on
    rank 0.
    """
    run_dir = RunDir(Path(config.output_dir))
    run_dir.require_no_patterns()
    plan = make_plan(config, own_losses)
    loader = open_corpus(plan)
    writes = launcher_rank() == 0 and not config.dry_run
    with run_lock.hold(run_dir.root, writes=writes) as lock:
        runtime = join_ranks(config.seed)
        checkpointer = Checkpointer(
            run_dir=run_dir,
            execution=plan.execution,
            runtime=runtime,
            identity=identity(plan),
            keep=config.train.keep,
            storage=storage_of(config.checkpoint.storage, runtime),
            on_error=config.checkpoint.on_error,
            accept_changes=config.accept_changes,
        )
        chosen = checkpointer.choose(config.resume, set_aside=not config.dry_run)
        if chosen is not None and not config.dry_run and from_rank_zero(lambda: is_finished(run_dir, chosen, config)):
            if runtime.is_rank_zero:
                print(
                    f"{run_dir.root} is finished at {chosen.tag}; student: {run_dir.student}. To train longer, set "
                    "more train.steps and accept_changes=true",
                    flush=True,
                )
            return
        outcome = Job(plan, run_dir, checkpointer, runtime, loader, lock, on_record).run(chosen)
    outcome.require_done(run_dir.root)


def is_finished(run_dir: RunDir, chosen: Chosen, config: RunConfig) -> bool:
    """Returns whether an earlier start has trained to the end with these settings, and its student and result are
    there."""
    if chosen.changes or not is_export(run_dir.student) or not run_dir.records.is_file():
        return False
    result = final_result(read_records(run_dir.records))
    if result is None or step_tag(result["steps_run"]) != chosen.tag:
        return False
    patience = config.train.patience
    is_enough = patience is not None and result["bad_evaluations"] >= patience
    return is_enough or result["steps_run"] == config.train.steps


@dataclass(frozen=True)
class Turn:
    """A step after which a run went on with other settings (accept_changes)."""

    step: int
    """Optimizer steps that were done."""
    position: int
    """Sequences that they took from the order of the corpus."""
    changes: list[str]
    """`key: before -> since`, for each setting."""


class Job:
    """One start of a run on this rank."""

    def __init__(
        self,
        plan: Plan,
        run_dir: RunDir,
        checkpointer: Checkpointer,
        runtime: Runtime,
        loader: CorpusLoader,
        lock: RunLock | None,
        on_record: OnRecord | None = None,
    ) -> None:
        self.plan, self.run_dir, self.checkpointer, self.runtime, self.loader = (
            plan,
            run_dir,
            checkpointer,
            runtime,
            loader,
        )
        self.lock, self._on_record = lock, on_record
        self.config = plan.config
        self.held_out: HeldOutLosses
        """Once there is a trainer"""
        self.turns: list[Turn] = []

    def run(self, chosen: Chosen | None) -> Outcome:
        """Trains from the checkpoint `chosen`, or anew, to the end; returns how it ended. Collective."""
        plan, config = self.plan, self.config
        if not config.dry_run:
            from_rank_zero(self._write_settings)
            self._tidy(chosen)
        teacher = load_teacher(plan, plan.losses.wanted_teacher, self.runtime.device)
        module, optimizer = build_module(plan, self.runtime.device)
        measured = self._measure(module, teacher) if chosen is None else None
        self.checkpointer = replace(self.checkpointer, export=describe_for_export(plan, module.student.config))
        if self.runtime.is_rank_zero:
            print(self._banner(teacher, module, optimizer, chosen, measured), flush=True)
        if config.dry_run:
            return Outcome.DONE
        monitor = self._open_monitor(flops_per_token(plan, teacher, module))
        model = DeepSpeedModel(module, optimizer.optimizer, config.train, plan.execution)
        step = 0
        if chosen is not None:
            state = self.checkpointer.load(model, chosen)
            step, measured = state["step"], Measured(**state["measured"])
            module.losses = plan.losses.scaled(measured.scales)
            self.turns = [Turn(**turn) for turn in state.get("turns", ())]  # older checkpoints have none
            if chosen.changes:
                model.take_rates(config.train)
            self._turn(chosen, step)
        assert measured is not None
        trainer = self._build_trainer(model, teacher, monitor, step, measured)
        if chosen is not None:
            self.held_out.restore(state, self.checkpointer, chosen)
        monitor.write_record(
            "run",
            status="started",
            step=step,
            resumed_from=None if chosen is None else chosen.tag,
            **self._facts(),
            steps=config.train.steps,
            measured=asdict(measured),
            turns=[asdict(turn) for turn in self.turns],
        )
        try:
            outcome = trainer.run()
            if outcome is Outcome.DONE and not self.loader.finish_check():
                monitor.say("the corpus was not fully compared with its checksums: training ended before")
            self._finish(outcome, trainer, monitor)
        finally:
            monitor.close()
            model.release()
        return outcome

    def _turn(self, chosen: Chosen, step: int) -> None:
        """Notes what a run goes on with that it did not begin with, and where it is in the corpus."""
        if chosen.changes:
            assert chosen.global_batch is not None
            last = self.turns[-1] if self.turns else Turn(0, 0, [])
            position = last.position + (step - last.step) * chosen.global_batch
            self.turns.append(Turn(step, position, list(chosen.changes)))
        if self.turns:
            self.loader.start_at(self.turns[-1].step, self.turns[-1].position)
            lines = [f"{'; '.join(turn.changes)}, from step {turn.step} on" for turn in self.turns]
            self.checkpointer.export["card"]["changed settings"] = "; ".join(lines)

    def _write_settings(self) -> None:
        plan = self.plan
        self.run_dir.write_settings(
            self.config,
            ds_config=plan.execution.resolved,
            tokenizer=plan.tokenizer,
            beside_tokenizer=None if plan.sentence is None else plan.sentence.write,
        )

    def _build_trainer(
        self, model: DeepSpeedModel, teacher: FrozenTeacher, monitor: Monitor, step: int, measured: Measured
    ) -> Trainer:
        plan, train = self.plan, self.config.train
        trainee = Trainee(
            model,
            train=train,
            terms=plan.losses,
            execution=plan.execution,
            runtime=self.runtime,
            monitor=monitor,
            sequence_ids=self.loader.sequence_ids,
            checkpointer=self.checkpointer,
            kept={"measured": asdict(measured), "turns": [asdict(turn) for turn in self.turns]},
        )
        self.held_out = HeldOutLosses(
            train, trainee, teacher, self.loader, plan.losses.held_out_names, plan.pooled_layers, plan.pooling
        )
        return Trainer(
            train=train,
            seed=self.config.seed,
            runtime=self.runtime,
            stop=StopRequest(),  # not before: until now a signal may simply end the process
            trainees=[trainee],
            teacher=teacher,
            loader=self.loader,
            evaluation=self.held_out,
            step=step,
        )

    def _measure(self, module: DistilModule, teacher: FrozenTeacher) -> Measured:
        """Measures what the losses of a new student are divided by, and what its projections start as, which are set.
        Collective."""
        if not module.losses.looks_at_slice:
            return Measured()
        batches = self.loader.first_batches(sequences_of(self.config.loss, self.plan.seq_len))
        return begin(module, TeacherSlice(batches, teacher, self.runtime.device, self.plan.teacher_shape))

    def _tidy(self, chosen: Chosen | None) -> None:
        """Puts what earlier starts left out of the way, and prints that."""
        tag = None if chosen is None else chosen.tag
        lines = list(() if chosen is None else chosen.notes)
        if self.lock is not None and self.lock.taken_from is not None:
            lines.append(f"took over the run directory from {self.lock.taken_from}, which has ended")
        if self.checkpointer.storage.is_keeper:
            lines += [f"removed {name}: an unfinished checkpoint" for name in self.checkpointer.clean()]
            for name in self.checkpointer.set_aside_after(tag) if tag is not None else ():
                lines.append(f"renamed {name} to superseded-{name}: the run continues from {tag}")
        if self.runtime.is_rank_zero:
            for old, new in self.run_dir.set_aside_logs() if tag is None else ():
                lines.append(f"renamed {old.name} to {new.name}: the run starts anew")
            if lines:
                print("\n".join(lines), flush=True)

    def _banner(
        self,
        teacher: FrozenTeacher,
        module: DistilModule,
        optimizer: ChosenOptimizer,
        chosen: Chosen | None,
        measured: Measured | None,
    ) -> str:
        return banner.describe_run(
            self.plan,
            teacher=teacher,
            module=module,
            measured=measured,
            optimizer=optimizer,
            epoch_sequences=self.loader.order.slots,
            device=self.runtime.where,
            start=banner.describe_continuing(chosen, self.run_dir, self.config.train),
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
            active=self.runtime.is_rank_zero,
            tensorboard=self.run_dir.tensorboard,
            records=self.run_dir.records,
            steps=self.config.train.steps,
            flops_per_token=flops_per_token,
            device=self.runtime.device,
            config_text=as_yaml(self.config),
            trackers=self.plan.execution.trackers,
            on_record=self._on_record,
        )

    def _finish(self, outcome: Outcome, trainer: Trainer, monitor: Monitor) -> None:
        """Exports, and records and prints how it ended (rank 0); what diverged is reported already. Collective."""
        step = self._export(trainer) if outcome is Outcome.DONE else trainer.step
        if not self.runtime.is_rank_zero or outcome is Outcome.DIVERGED:
            return
        monitor.end_progress()
        if outcome is Outcome.PREEMPTED:
            monitor.write_record("run", status="preempted", step=trainer.step, signal=trainer.stop.signal)
            monitor.say(f"saved step {trainer.step}; the same command continues")
            return
        history = monitor.history
        if not history.steps:  # records.jsonl was removed from a finished run
            monitor.say(f"already finished; student {self.run_dir.student}")
            return
        exported = history.steps.get(step, history.last)
        held_out = history.held_out if self.held_out.best is None else asdict(self.held_out.best)
        comparison = None
        if self.config.measure:
            description = self._describe_export(step, trainer.step)
            comparison = compare_with_teacher(
                self.plan, self.run_dir, description, device=self.runtime.device, tell=monitor.say
            )
        monitor.write_record(
            "result",
            status="done",
            step=step,
            steps_run=trainer.step,
            bad_evaluations=self.held_out.bad,
            losses=exported["losses"],
            total=exported["total"],
            held_out=held_out,
            tokens_per_s=history.tokens_per_s,
            peak_memory_gib=history.peak_memory_gib,
            student=str(self.run_dir.student),
            comparison=None if comparison is None else asdict(comparison),
            **self._facts(),
        )
        held_out_loss = {} if held_out is None else {"held_out_loss": held_out["total"]}
        monitor.write_hparams(hyperparameters(self.plan), {"loss": exported["total"], **held_out_loss})
        why = self.held_out.describe_end(trainer.step)
        table = describe_end(
            self.run_dir, history, exported, held_out, comparison, ranks=self.runtime.world_size, why=why
        )
        monitor.say(f"\n{table}")

    def _describe_export(self, step: int, steps_run: int) -> dict[str, Any]:
        why = self.held_out.describe_end(steps_run)
        card = self.checkpointer.export["card"] | ({} if why is None else {"chosen": why})
        return {**self.checkpointer.export, "card": card, "step": step}

    def _export(self, trainer: Trainer) -> int:
        """Writes the student of the last step, or of the best one; returns that step. Collective. Raises RunFailure
        with the remedy."""
        model, best = trainer.trainees[0].model, self.held_out.best
        step = trainer.step if best is None else best.step
        if step != trainer.step:
            self.checkpointer.load(model, self.checkpointer.at(step))
        try:
            export_live(self.run_dir, model.module, self._describe_export(step, trainer.step))
        except RunFailure as error:
            tag = f" --tag {step_tag(step)}" if step != trainer.step else ""
            raise RunFailure(
                f"{error}. Training is done and checkpoint {step_tag(step)} is complete: make room, then start "
                f"the same command again, or {command('export')} --run {shlex.quote(str(self.run_dir.root))}{tag}"
            ) from None
        return step
