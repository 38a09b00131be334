"""Who evaluates which genome: trials of an Optuna study, claimed under a lock that all drivers share.

A trial is RUNNING from the moment it is asked for until it has an outcome. Its owner is the driver that works on it; a
trial without an owner, or whose owner is dead, is open and taken up by whoever comes first. So a driver may die at any
moment, and no genome is run twice: what a job has recorded counts, whoever reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from engine.errors import UserError
from engine.records.run_dir import RunDir
from engine.records.yardstick import Yardstick
from ga.jobs.launcher import LOG, end_lost_job
from ga.jobs.outcome import JobReport, Outcome, read_job
from ga.optuna_private import id_of, note, report, resume_trial, set_trial_attr, trial_attrs, trial_now
from ga.study import evaluations
from ga.study.drivers import Drivers
from ga.study.evaluations import OWNER, Evaluation
from ga.study.proxy_identity import confirm_proxy, proxy_of
from ga.study.sources import Proposal, Source
from ga.study.storage import SearchStorage

LOSSES, FOLDER = "mapdistill:losses", "mapdistill:folder"
"""System attributes of a trial: how often it was lost and to what, folder of its job."""
RETRIES = {"job": 1, "driver": 3}
"""Number of tries more after a trial's job died while its driver lived, and after its driver died."""
ORPHANS_GRACE_S = 5.0


@dataclass(frozen=True)
class Claim:
    """A trial that this driver has to evaluate."""

    trial_id: int
    number: int
    genome: str
    seed: int


class Ledger:
    def __init__(
        self,
        storage: SearchStorage,
        source: Source,
        drivers: Drivers,
        *,
        yardstick: Yardstick,
        known: Mapping[str, Evaluation] | None = None,
    ) -> None:
        """Takes what makes a fitness of scores (yardstick; empty: what the job says), and evaluations by other
        studies that can be compared with this one's, by genome (known)."""
        self._storage, self._source, self._drivers = storage, source, drivers
        self._study: Study = source.study
        self._known, self._yardstick = known or {}, yardstick
        self._held: set[int] = set()
        """Trial ids of claims that were handed out. What is owned beside them was claimed when the storage failed."""
        self.orphans_ended = 0
        """Processes of dead drivers' jobs that were still there."""

    def claim(self, limit: int) -> list[Claim]:
        """Claims up to `limit` trials of one seed to evaluate now; none when there are none, or none yet."""
        with self._storage.lock():
            self._recover()
            claims: list[Claim] = []
            taken: set[int] = set()
            while len(claims) < limit and (trial := self._open_trial(self._held | taken) or self._ask()) is not None:
                proposal = self._describe(trial)
                if self._settle_known(trial, proposal):
                    continue
                if claims and claims[0].seed != proposal.seed:
                    break  # it stays open
                self._set(id_of(trial), OWNER, self._drivers.me.id)
                claims.append(Claim(id_of(trial), trial.number, proposal.genome, proposal.seed))
                taken.add(id_of(trial))
        self._held |= taken
        return claims

    @property
    def has_begun(self) -> bool:
        """Whether any job of the study has come so far as to name its fingerprint."""
        return proxy_of(self._study) is not None

    def is_over(self) -> bool:
        """Tells whether every trial is finished and no more will be asked for."""
        with self._storage.lock():
            trials = self._trials()
            return all(t.state != TrialState.RUNNING for t in trials) and self._source.is_over(trials)

    def batch(self) -> int:
        """Returns how many trials may be worked on side by side; drivers share them evenly."""
        return self._source.batch(self._trials())

    def begin(self, claims: Sequence[Claim], folder: Path) -> None:
        """Notes where their job will write, before it starts."""
        for claim in claims:
            self._set(claim.trial_id, FOLDER, str(folder.resolve()))
            note(self._study, claim.trial_id, {evaluations.JOB: f"{self._drivers.me.host}:{folder}"})

    def finish(self, claims: Sequence[Claim], job: JobReport, *, seconds: float, cohort: int) -> None:
        """Writes down what became of claims of a job that took `seconds` for `cohort` genomes. Those that were lost are
        open again, once. A claim that another driver has taken over meanwhile is left alone. Raises UserError for a job
        of another proxy than the study's first; its claims are open again."""
        with self._storage.lock():
            mine = [claim for claim in claims if self._is_mine(trial_now(self._study, claim.trial_id))]
            try:
                confirm_proxy(self._study, job)
            except UserError:
                for claim in mine:
                    self._reopen(claim.trial_id)
                raise
            for claim in mine:
                cost = {evaluations.SECONDS: seconds / cohort, evaluations.COHORT: cohort}
                self._settle(trial_now(self._study, claim.trial_id), job, lost_with="job", notes=cost)
        self._held -= {claim.trial_id for claim in claims}

    def release(self, claims: Sequence[Claim]) -> None:
        """Opens claims again, as if they had not been claimed."""
        with self._storage.lock():
            for claim in claims:
                if self._is_mine(trial_now(self._study, claim.trial_id)):
                    self._reopen(claim.trial_id)
        self._held -= {claim.trial_id for claim in claims}

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _set(self, trial_id: int, key: str, value: Any) -> None:
        set_trial_attr(self._study, trial_id, key, value)

    def _reopen(self, trial_id: int) -> None:
        self._set(trial_id, FOLDER, "")  # or its next owner could be judged by this job
        self._set(trial_id, OWNER, "")

    def _is_mine(self, trial: FrozenTrial) -> bool:
        return trial.state == TrialState.RUNNING and trial_attrs(trial).get(OWNER) == self._drivers.me.id

    def _open_trial(self, held: set[int]) -> optuna.Trial | None:
        """Returns a trial that nobody works on. held: ids of what this driver works on."""
        for trial in self._trials():
            owner = trial_attrs(trial).get(OWNER, "")
            if trial.state == TrialState.RUNNING and owner in ("", self._drivers.me.id) and id_of(trial) not in held:
                return resume_trial(self._study, trial)
        return None

    def _ask(self) -> optuna.Trial | None:
        trials = self._trials()
        if not self._source.may_ask(trials):
            return None
        self._source.before_ask(trials)
        return self._study.ask()

    def _describe(self, trial: optuna.Trial) -> Proposal:
        proposal = self._source.proposal(trial)
        notes: dict[str, Any] = {evaluations.SEED: proposal.seed}
        if proposal.generation is not None:
            notes[evaluations.GENERATION] = proposal.generation
        notes[evaluations.GENOME] = proposal.genome  # last: what has a genome is described
        note(self._study, id_of(trial), notes)
        return proposal

    def _settle_known(self, trial: optuna.Trial, proposal: Proposal) -> bool:
        """Settles a trial whose outcome is there already: from another trial, which costs nothing of the budget, or
        from another study. Returns whether it was."""
        for other in self._trials():
            if other.number >= trial.number or other.state == TrialState.WAITING:
                continue
            if other.state == TrialState.FAIL and self._source.tries_again:
                continue
            if (other.user_attrs.get(evaluations.GENOME), other.user_attrs.get(evaluations.SEED)) == (
                proposal.genome,
                proposal.seed,
            ):
                same = {evaluations.OUTCOME: evaluations.REPEATED, evaluations.SAME_AS: other.number}
                note(self._study, id_of(trial), same)
                self._tell(trial.number, other.values if other.state == TrialState.COMPLETE else None)
                return True
        known = self._known.get(proposal.genome)
        if known is None:
            return False
        note(
            self._study,
            id_of(trial),
            {
                evaluations.OUTCOME: Outcome.OK.value,
                evaluations.BY_SEED: {str(seed): value for seed, value in known.by_seed.items()},
                evaluations.SCORES: dict(known.scores),
                evaluations.REPORTS: {str(step): value for step, value in known.reports.items()},
                evaluations.SECONDS: 0.0,
                evaluations.JOB: known.job,
            },
        )
        assert known.fitness is not None
        self._tell(trial.number, self._source.objectives(proposal.genome, known.fitness))
        return True

    def _tell(self, number: int, values: Sequence[float] | None) -> None:
        """Ends a trial with its values; without any it has failed."""
        if values is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, list(values))

    def _settle(self, trial: FrozenTrial, job: JobReport, *, lost_with: str, notes: Mapping[str, Any]) -> None:
        genome, id = str(trial.user_attrs[evaluations.GENOME]), id_of(trial)
        outcome = job.outcomes[genome]
        if outcome in (Outcome.LOST, Outcome.BAD_CONFIGURATION):
            losses = {"job": 0, "driver": 0} | trial_attrs(trial).get(LOSSES, {})
            losses[lost_with] += 1
            self._set(id, LOSSES, losses)
            if losses[lost_with] <= RETRIES[lost_with]:
                self._reopen(id)
                return
        note(self._study, id, {**notes, evaluations.OUTCOME: outcome.value})
        if outcome is Outcome.OK:
            found = evaluations.summarise_results(job.results[genome], self._yardstick)
            note(self._study, id, found)
            fitness = fmean(found[evaluations.BY_SEED].values())
            report(self._study, id, found[evaluations.REPORTS])
            self._tell(trial.number, self._source.objectives(genome, fitness))
        elif outcome is Outcome.STOPPED:
            reports = {str(step): value for step, value in job.stopped[genome].items()}
            note(self._study, id, {evaluations.REPORTS: reports})
            report(self._study, id, reports)
            self._study.tell(trial.number, state=TrialState.PRUNED)
        else:
            note(self._study, id, {evaluations.MESSAGE: job.message})
            self._tell(trial.number, None)

    def _recover(self) -> None:
        """Recovers the trials of dead drivers: their jobs are ended, their results count, the others are open again."""
        dead = self._drivers.dead()
        lost: dict[tuple[str, str], list[FrozenTrial]] = defaultdict(list)
        for trial in self._trials():
            owner = trial_attrs(trial).get(OWNER)
            if trial.state == TrialState.RUNNING and owner in dead:
                lost[owner, trial_attrs(trial).get(FOLDER, "")].append(trial)
        for (owner, folder), trials in lost.items():
            if not folder:  # it died before it started their job
                for trial in trials:
                    self._set(id_of(trial), OWNER, "")
                continue
            if self._drivers.ran_here(owner):
                self.orphans_ended += end_lost_job(Path(folder), grace_s=ORPHANS_GRACE_S)
            genomes = [str(trial.user_attrs[evaluations.GENOME]) for trial in trials]
            records = RunDir(Path(folder)).records
            job = read_job(Path(folder) / LOG, records, genomes=genomes, exit_code=None, timed_out=False)
            if len(trials) > 1:  # out of memory side by side is not out of memory alone
                again = {genome: Outcome.LOST for genome, one in job.outcomes.items() if one is Outcome.OUT_OF_MEMORY}
                job = replace(job, outcomes={**job.outcomes, **again})
            try:
                confirm_proxy(self._study, job)
            except UserError:  # that driver's proxy was another one; this one's is not to blame
                job = JobReport(dict.fromkeys(genomes, Outcome.LOST), {}, {}, "of another proxy")
            for trial in trials:
                self._settle(trial, job, lost_with="driver", notes={})
