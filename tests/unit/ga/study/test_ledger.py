"""Claims on a real storage: no genome twice, nothing lost when a driver dies at any moment."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from engine.errors import UserError
from engine.records.processes import start_ticks
from engine.records.records import format_record
from ga.config import SearchConfig, SearchSection
from ga.evolution.genome import Space
from ga.jobs.outcome import JobReport, Outcome
from ga.optuna_private import set_trial_attr
from ga.study import evaluations
from ga.study.drivers import Driver, Drivers
from ga.study.evaluations import Evaluation, read_history
from ga.study.ledger import FOLDER, LOSSES, OWNER, Claim, Ledger
from ga.study.sources import ListSource, SearchSource, deepest_layer
from ga.study.storage import SearchStorage, open_storage

SPACE = Space(student_layers=2, teacher_layers=4)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where SQLite need not wait for a disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def storage(memory: Path) -> Iterator[SearchStorage]:
    opened = open_storage(f"sqlite:///{memory / 'study.db'}")
    yield opened
    opened.close()


@pytest.fixture
def neighbour() -> Iterator[Driver]:
    """Another driver of this machine that is alive: a real process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = start_ticks(process.pid)
        assert started is not None
        yield dataclasses.replace(Driver.this_process(), pid=process.pid, started=started)
        process.kill()


def gone() -> Driver:
    """A driver of this machine whose process has ended: the id is another process's by now."""
    me = Driver.this_process()
    return dataclasses.replace(me, started=me.started - 1)


def make_source(storage: SearchStorage, name: str = "search", **settings: object) -> SearchSource:
    section = SearchSection(**{"trials": 12, "population": 4, **settings})  # type: ignore[arg-type]
    directions = ["maximize", "minimize"] if section.second_objective else ["maximize"]
    study = optuna.create_study(storage=storage.optuna, study_name=name, directions=directions, load_if_exists=True)
    source = SearchSource(study, SPACE, section, proxy_seed=7)
    source.start()
    return source


def make_ledger(
    storage: SearchStorage, source: SearchSource, driver: Driver | None = None, **known: Evaluation
) -> Ledger:
    drivers = Drivers(source.study, driver or Driver.this_process(), placements=1)
    return Ledger(storage, source, drivers, yardstick={}, known=known)


OWN: dict[str, object] = {"yardstick": {}}
"""A job's own: what it says of its fitness counts."""


def fitness_of(genome: str) -> float:
    return sum(int(gene) for gene in genome.split("-")) / 10


def report(claims: list[Claim], **outcomes: Outcome) -> JobReport:
    """A job in which all went well, but for the genomes named like _2_4."""
    found = {c.genome: outcomes.get("_" + c.genome.replace("-", "_"), Outcome.OK) for c in claims}
    results = {
        c.genome: ({"seed": 7, "fitness": fitness_of(c.genome), "scores": {"SST-2": 0.5}, "reports": {}} | OWN,)
        for c in claims
        if found[c.genome] is Outcome.OK
    }
    stopped = {genome: {3: 0.25} for genome, outcome in found.items() if outcome is Outcome.STOPPED}
    return JobReport(found, results, stopped, "what happened")


def finish(ledger: Ledger, claims: list[Claim], **outcomes: Outcome) -> None:
    ledger.finish(claims, report(claims, **outcomes), seconds=10.0, cohort=len(claims))


def evaluate_all(ledger: Ledger, limit: int = 3) -> list[str]:
    done: list[str] = []
    while claims := ledger.claim(limit):
        finish(ledger, claims)
        done += [claim.genome for claim in claims]
    return done


@pytest.mark.parametrize("sampler", ["ga", "random", "tpe", "nsga2"])
def test_every_sampler_spends_the_budget_on_different_genomes(storage: SearchStorage, sampler: str) -> None:
    source = make_source(storage, sampler=sampler, trials=20)
    ledger = make_ledger(storage, source)
    done = evaluate_all(ledger)
    assert len(set(done)) == len(done) == 20
    assert {SPACE.text(genes) for genes in SPACE.seeds(())} <= set(done)
    assert ledger.is_over()
    counted = [one for one in read_history(source.study) if one.counts]
    assert [one.fitness for one in counted] == [fitness_of(one.genome) for one in counted]
    assert {one.seconds for one in counted} <= {10.0 / n for n in (1, 2, 3)}


def test_a_search_ends_with_its_space(storage: SearchStorage) -> None:
    done = evaluate_all(make_ledger(storage, make_source(storage, sampler="tpe", trials=1000)), limit=8)
    assert sorted(done) == sorted(SPACE.text(genes) for genes in SPACE)


def test_children_wait_for_the_whole_generation(storage: SearchStorage, neighbour: Driver) -> None:
    source = make_source(storage)
    mine, theirs = make_ledger(storage, source), make_ledger(storage, source, neighbour)
    first, second = mine.claim(3), theirs.claim(10)
    assert len(first) == 3
    assert len(second) == 2, "generation 0 has five heuristics"
    finish(theirs, second)
    assert not theirs.claim(10), "a parent may still be among the running ones"
    assert not theirs.is_over()
    finish(mine, first)
    assert len(theirs.claim(10)) == 4
    assert {one.generation for one in read_history(source.study)} == {0, 1}


def test_the_order_in_which_jobs_finish_changes_nothing(memory: Path) -> None:
    proposed = []
    for order in (1, -1):
        storage = open_storage(f"sqlite:///{memory / f'{order}.db'}")
        ledger = make_ledger(storage, make_source(storage))
        for _ in range(3):
            jobs = [claims for claims in (ledger.claim(2), ledger.claim(1), ledger.claim(5)) if claims]
            for claims in jobs[::order]:
                finish(ledger, claims)
        proposed.append([one.genome for one in read_history(ledger._study)])
        storage.close()
    assert proposed[0] == proposed[1]


def test_a_live_driver_keeps_its_claims_and_a_dead_one_loses_them(
    storage: SearchStorage, neighbour: Driver, tmp_path: Path
) -> None:
    source = make_source(storage, trials=5)
    kept = make_ledger(storage, source, neighbour).claim(1)
    lost = make_ledger(storage, source, gone()).claim(2)
    ledger = make_ledger(storage, source)
    claims = ledger.claim(10)
    assert {claim.number for claim in claims} == {claim.number for claim in lost} | {3, 4}
    assert not {claim.number for claim in claims} & {claim.number for claim in kept}
    finish(ledger, claims)
    assert not ledger.is_over()


def test_what_a_dead_drivers_job_has_recorded_counts(storage: SearchStorage, tmp_path: Path) -> None:
    source = make_source(storage, trials=5)
    died = make_ledger(storage, source, gone())
    lost = died.claim(3)
    folder = tmp_path / "trials" / "00000"
    folder.mkdir(parents=True)
    died.begin(lost, folder)
    started = format_record("run", status="started", fingerprint="f", seeds=[7])
    result = format_record(
        "result", genome=lost[1].genome, seed=7, fingerprint="f", fitness=0.75, scores={}, reports={}, yardstick={}
    )
    (folder / "records.jsonl").write_text(f"{started}\n{result}\n")
    ledger = make_ledger(storage, source)
    again = ledger.claim(10)
    assert lost[1].number not in {claim.number for claim in again}
    assert {lost[0].number, lost[2].number} <= {claim.number for claim in again}
    assert read_history(source.study)[lost[1].number].fitness == 0.75
    losses = [source.study.trials[claim.number].system_attrs[LOSSES] for claim in (lost[0], lost[2])]
    assert losses == [{"job": 0, "driver": 1}] * 2


def test_a_job_of_another_proxy_stops_the_driver_and_costs_no_genome(storage: SearchStorage) -> None:
    source = make_source(storage, trials=5)
    ledger = make_ledger(storage, source)
    first, second = ledger.claim(1), ledger.claim(2)
    assert not ledger.has_begun
    ledger.finish(first, dataclasses.replace(report(first), fingerprint="f"), seconds=1.0, cohort=1)
    assert ledger.has_begun
    other = dataclasses.replace(report(second), fingerprint="g", parts={"train": {"precision": "bfloat16"}})
    with pytest.raises(UserError, match=r"the proxy has changed since \(fingerprint f, now g: train\)"):
        ledger.finish(second, other, seconds=1.0, cohort=2)
    assert [one.outcome for one in read_history(source.study)] == ["ok", "running", "running"]
    again = make_ledger(storage, source).claim(2)
    assert again == second
    assert all(LOSSES not in source.study.trials[claim.number].system_attrs for claim in again)


def test_what_a_dead_driver_has_recorded_with_another_proxy_does_not_count(
    storage: SearchStorage, tmp_path: Path
) -> None:
    source = make_source(storage, trials=5)
    ledger = make_ledger(storage, source)
    mine = ledger.claim(1)
    ledger.finish(mine, dataclasses.replace(report(mine), fingerprint="f"), seconds=1.0, cohort=1)
    died = make_ledger(storage, source, gone())
    (lost,) = died.claim(1)
    folder = tmp_path / "trials" / "00001"
    folder.mkdir(parents=True)
    died.begin([lost], folder)
    started = format_record("run", status="started", fingerprint="g", fingerprint_parts={}, seeds=[7])
    result = format_record(
        "result", genome=lost.genome, seed=7, fingerprint="g", fitness=0.75, scores={}, reports={}, yardstick={}
    )
    (folder / "records.jsonl").write_text(f"{started}\n{result}\n")
    assert lost.number in {claim.number for claim in ledger.claim(5)}


def test_a_lost_trial_is_tried_again_once(storage: SearchStorage) -> None:
    source = make_source(storage, trials=5)
    ledger = make_ledger(storage, source)
    claims = ledger.claim(1)
    for _ in range(2):
        assert ledger.claim(1) != claims
        finish(ledger, claims, _2_4=Outcome.LOST)
        again = ledger.claim(1)
        if not again or again[0].number != claims[0].number:
            break
    found = read_history(source.study)[0]
    assert (found.outcome, found.fitness, found.message) == ("lost", None, "what happened")
    assert source.study.trials[0].system_attrs[LOSSES] == {"job": 2, "driver": 0}


@pytest.mark.parametrize("outcome", [Outcome.DIVERGED, Outcome.TIMEOUT, Outcome.OUT_OF_MEMORY])
def test_a_failed_trial_has_no_fitness_and_is_not_tried_again(storage: SearchStorage, outcome: Outcome) -> None:
    source = make_source(storage, trials=5)
    ledger = make_ledger(storage, source)
    claims = ledger.claim(5)
    finish(ledger, claims, _2_4=outcome)
    assert not ledger.claim(5)
    assert ledger.is_over()
    found = {one.genome: one for one in read_history(source.study)}
    assert (found["2-4"].outcome, found["2-4"].fitness) == (outcome.value, None)
    assert source.study.trials[0].state == optuna.trial.TrialState.FAIL


def test_a_student_that_was_stopped_early_is_pruned(storage: SearchStorage) -> None:
    source = make_source(storage, trials=5)
    ledger = make_ledger(storage, source)
    finish(ledger, ledger.claim(5), _4_4=Outcome.STOPPED)
    found = {one.genome: one for one in read_history(source.study)}["4-4"]
    assert (found.outcome, found.fitness, found.reports) == ("stopped early", None, {3: 0.25})
    assert source.study.trials[found.number].state == optuna.trial.TrialState.PRUNED
    assert source.study.trials[found.number].intermediate_values == {3: 0.25}


def test_released_claims_are_open_and_were_not_lost(storage: SearchStorage) -> None:
    source = make_source(storage)
    ledger = make_ledger(storage, source)
    claims = ledger.claim(3)
    ledger.release(claims)
    assert ledger.claim(3) == claims
    assert LOSSES not in source.study.trials[0].system_attrs


def test_claims_that_the_storage_cut_off_are_claimed_again(storage: SearchStorage) -> None:
    """The first trial was owned when the storage failed, and nobody was told of it."""
    source = make_source(storage, trials=5)
    ledger = make_ledger(storage, source)
    first = ledger.claim(1)
    ledger.release(first)
    set_trial_attr(source.study, first[0].trial_id, OWNER, Driver.this_process().id)
    claims = ledger.claim(5)
    assert len(claims) == 5
    assert claims[0] == first[0]
    assert not ledger.claim(5)


def test_a_driver_that_was_taken_for_dead_cannot_write_over_another(storage: SearchStorage, neighbour: Driver) -> None:
    source = make_source(storage)
    sleeper, other = make_ledger(storage, source, neighbour), make_ledger(storage, source)
    claims = sleeper.claim(2)
    for claim in claims:  # as if it had been silent for too long
        set_trial_attr(source.study, claim.trial_id, OWNER, "")
    taken = other.claim(2)
    assert [claim.number for claim in taken] == [claim.number for claim in claims]
    finish(sleeper, claims, _2_4=Outcome.DIVERGED)
    assert {one.outcome for one in read_history(source.study)} == {"running"}
    finish(other, taken)
    assert {one.outcome for one in read_history(source.study)} == {"ok"}


def test_a_driver_that_dies_while_it_asks_loses_nothing(storage: SearchStorage) -> None:
    """In each state that a SIGKILL can leave: asked for, one gene suggested, described but not owned."""
    source = make_source(storage, trials=5)
    source.study.ask()
    source.study.ask().suggest_int("layer_1", 0, 4)
    source.proposal(source.study.ask())
    ledger = make_ledger(storage, source)
    claims = ledger.claim(10)
    assert [claim.genome for claim in claims] == [SPACE.text(genes) for genes in SPACE.seeds(())]


def test_results_of_another_study_are_taken_over(storage: SearchStorage) -> None:
    known = Evaluation(3, "2-4", "ok", fitness=0.9, by_seed={7: 0.9}, scores={"SST-2": 0.9}, seconds=5.0, job="h:f")
    source = make_source(storage, trials=5)
    ledger = make_ledger(storage, source, None, **{"2-4": known})
    assert "2-4" not in {claim.genome for claim in ledger.claim(10)}
    found = read_history(source.study)[0]
    assert (found.genome, found.fitness, found.scores, found.seconds) == ("2-4", 0.9, {"SST-2": 0.9}, 0.0)


def test_a_sampler_that_repeats_itself_is_given_something_new(storage: SearchStorage) -> None:
    source = make_source(storage, sampler="random", trials=12)
    source.study.sampler = optuna.samplers.PartialFixedSampler(
        {"layer_1": 3, "layer_2": 3}, optuna.samplers.RandomSampler(seed=0)
    )
    done = evaluate_all(make_ledger(storage, source), limit=1)
    assert len(set(done)) == len(done) == 12
    repeated = [one for one in read_history(source.study) if not one.counts]
    assert len(repeated) >= 25
    assert {one.genome for one in repeated} == {"3-3"}
    assert all(one.fitness == fitness_of("3-3") for one in repeated), "the sampler may learn from them"


def test_constraints_are_repaired_for_samplers_that_do_not_know_them(storage: SearchStorage) -> None:
    space = Space(student_layers=2, teacher_layers=4, constraint="strictly_increasing", min_active=1)
    study = optuna.create_study(storage=storage.optuna, direction="maximize")
    source = SearchSource(study, space, SearchSection(sampler="tpe", trials=space.size()), proxy_seed=0)
    source.start()
    assert sorted(evaluate_all(make_ledger(storage, source))) == sorted(space.text(genes) for genes in space)


def test_the_second_objective_is_the_deepest_teacher_layer(storage: SearchStorage) -> None:
    source = make_source(storage, sampler="nsga2", second_objective="deepest_layer", trials=8)
    evaluate_all(make_ledger(storage, source))
    for trial in source.study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        genome = trial.user_attrs[evaluations.GENOME]
        assert trial.values == [fitness_of(genome), float(max(map(int, genome.split("-"))))]
    assert deepest_layer("0-3/1-4") == 4


def test_confirmations_run_each_pair_once_and_one_seed_at_a_time(storage: SearchStorage) -> None:
    study = optuna.create_study(storage=storage.optuna, direction="maximize", study_name="again")
    source = ListSource(study, SPACE)
    for _ in range(2):  # the second time nothing is new
        for seed in (8, 9):
            for genome in ("2-4", "0-3"):
                source.add(genome, seed)
    ledger = Ledger(storage, source, Drivers(study, Driver.this_process(), placements=1), yardstick={})
    seen = []
    while claims := ledger.claim(8):
        assert len({claim.seed for claim in claims}) == 1
        seen += [(claim.genome, claim.seed) for claim in claims]
        finish(ledger, claims)
    assert sorted(seen) == [("0-3", 8), ("0-3", 9), ("2-4", 8), ("2-4", 9)]
    assert ledger.is_over()


def test_a_job_knows_its_share(storage: SearchStorage, neighbour: Driver) -> None:
    source = make_source(storage, population=8)
    assert make_ledger(storage, source).batch() == 8
    drivers = Drivers(source.study, Driver.this_process(), placements=1)
    assert drivers.all_placements() == 1
    Drivers(source.study, neighbour, placements=3)
    assert drivers.all_placements() == 4
    Drivers(source.study, neighbour, placements=3).leave()
    assert drivers.all_placements() == 1


def test_a_driver_on_another_machine_is_dead_when_its_beat_stands_still(
    storage: SearchStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_source(storage).study
    monkeypatch.setattr("ga.study.drivers.LEASE_S", 0.2)
    monkeypatch.setattr("ga.study.drivers.BEAT_EVERY_S", 0.0)
    elsewhere = dataclasses.replace(Driver.this_process(), host="elsewhere", boot="other", pid=1)
    far, here = Drivers(study, elsewhere, placements=1), Drivers(study, Driver.this_process(), placements=1)
    for _ in range(4):
        far.beat()
        assert here.dead() == set()
        time.sleep(0.1)
    time.sleep(0.2)
    assert here.dead() == {elsewhere.id}
    far.beat()
    assert here.dead() == set()
    far.leave()
    assert here.dead() == {elsewhere.id}
    assert not here.ran_here(elsewhere.id)


def test_a_search_config_makes_the_configuration_of_its_jobs(tmp_path: Path) -> None:
    from engine.config.proxy import ProxyJobConfig
    from engine.config.reading import parse_config
    from engine.records.run_dir import as_yaml

    argv = ["--proxy.report_at", "[3, 5]", "--search.halving", "2", "--seed", "4", "--student.layers", "2"]
    config = parse_config(SearchConfig, argv, "test")
    job = config.job(
        output_dir="there", genomes=["1-2"], proxy=dataclasses.replace(config.proxy, stop_below={3: 0.5, 5: 0.625})
    )
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml(job))
    assert parse_config(ProxyJobConfig, ["--config", str(path)], "test") == job
    assert (job.seed, job.student.layers, job.proxy.stop_below) == (4, 2, {3: 0.5, 5: 0.625})


def test_folders_and_owners_are_in_the_storage_before_a_job_is(storage: SearchStorage, tmp_path: Path) -> None:
    source = make_source(storage)
    ledger = make_ledger(storage, source)
    claims = ledger.claim(2)
    ledger.begin(claims, tmp_path / "trials" / "00000")
    for claim in claims:
        attrs = source.study.trials[claim.number].system_attrs
        assert attrs[FOLDER] == str(tmp_path / "trials" / "00000")
        assert attrs[OWNER] == Driver.this_process().id
    assert json.dumps(read_history(source.study)[0].job).endswith('trials/00000"')


def test_an_orphan_cohort_out_of_memory_is_tried_again_and_not_judged_by_it_twice(
    storage: SearchStorage, tmp_path: Path
) -> None:
    source = make_source(storage, trials=5)
    died = make_ledger(storage, source, gone())
    lost = died.claim(3)
    folder = tmp_path / "trials" / "00000"
    folder.mkdir(parents=True)
    died.begin(lost, folder)
    (folder / "output.log").write_text("torch.OutOfMemoryError: CUDA out of memory\n")
    ledger = make_ledger(storage, source)
    alone = ledger.claim(1)
    assert alone[0].number == lost[0].number
    # a driver that dies between claim and begin leaves no folder to judge its claim by
    assert source.study.trials[alone[0].number].system_attrs[FOLDER] == ""
    set_trial_attr(source.study, alone[0].trial_id, OWNER, gone().id)
    assert {claim.number for claim in make_ledger(storage, source).claim(9)} >= {claim.number for claim in lost}
    assert {one.outcome for one in read_history(source.study)} == {"running"}


def test_a_trial_that_a_user_has_queued_does_not_stop_the_generations(storage: SearchStorage) -> None:
    source = make_source(storage, trials=20)
    ledger = make_ledger(storage, source)
    finish(ledger, ledger.claim(9))
    source.study.enqueue_trial({"layer_1": 3, "layer_2": 3})
    assert "3-3" in evaluate_all(ledger)
    assert ledger.is_over()


def test_an_observer_that_could_not_look_takes_nobody_for_dead(
    storage: SearchStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_source(storage).study
    monkeypatch.setattr("ga.study.drivers.LEASE_S", 0.1)
    monkeypatch.setattr("ga.study.drivers.BLIND_S", 0.05)
    elsewhere = dataclasses.replace(Driver.this_process(), host="elsewhere", boot="other", pid=1)
    Drivers(study, elsewhere, placements=1)
    here = Drivers(study, Driver.this_process(), placements=1)
    assert here.dead() == set()
    time.sleep(0.3)  # as in an outage of the storage, when nobody can give a sign of life
    assert here.dead() == set()
    deadline = time.monotonic() + 5
    while not here.dead():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pairs_of_a_list_are_queued_once_however_near_their_seeds(storage: SearchStorage) -> None:
    study = optuna.create_study(storage=storage.optuna, study_name="list")
    source = ListSource(study, SPACE)
    for _ in range(2):
        for seed in (123456, 123457, 123458):
            source.add("2-4", seed)
    ledger = Ledger(storage, source, Drivers(study, Driver.this_process(), placements=1), yardstick={})
    found = []
    while claims := ledger.claim(1):
        found.append(claims[0].seed)
        finish(ledger, claims)
    assert found == [123456, 123457, 123458]


def test_a_pair_of_a_list_that_has_failed_is_tried_again_when_it_is_asked_for_again(storage: SearchStorage) -> None:
    study = optuna.create_study(storage=storage.optuna, study_name="list", direction="maximize")
    source = ListSource(study, SPACE)
    ledger = Ledger(storage, source, Drivers(study, Driver.this_process(), placements=1), yardstick={})
    for outcome in (Outcome.TIMEOUT, Outcome.OK):
        source.add("2-4", 7)
        source.add("2-4", 7)
        claims = ledger.claim(5)
        assert [claim.genome for claim in claims] == ["2-4"]
        finish(ledger, claims, _2_4=outcome)
        assert ledger.claim(5) == []
    source.add("2-4", 7)
    assert ledger.claim(5) == [], "it has a fitness now"
