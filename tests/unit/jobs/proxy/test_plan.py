"""What makes two fitness values comparable, which genomes learn anything, and the table of a proxy job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from glue_sample import write_glue_sample
from launching import write_ds_config
from tiny_world import TinyWorld

from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config, read_config
from engine.errors import UserError
from engine.jobs.proxy.facts import code_version
from engine.jobs.proxy.plan import OwnEvaluator, ProxyPlan, make_proxy_plan
from engine.jobs.proxy.report import earlier_results, fitness_table, signal_of
from engine.losses.base import NO_LOSSES, Evaluated, HiddenMapped, Loss, OwnLosses, StepInputs
from engine.losses.hidden import EmbeddingLoss
from engine.records.records import format_record
from engine.records.yardstick import TaskScale


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    write_glue_sample(folder)
    return folder


def plan(world: TinyWorld, glue: Path, *genomes: str, **settings: object) -> ProxyPlan:
    values: dict[str, object] = {
        "teacher.path": world.teacher,
        "student.layers": 2,
        "data.path": world.corpus,
        "task.data_dir": glue,
        "train.warmup_steps": 2,
        "proxy.steps": 6,
    }
    values.update({key.replace("__", "."): value for key, value in settings.items()})
    argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    listed = ["--genomes", *genomes] if genomes else []
    return make_proxy_plan(parse_config(ProxyJobConfig, [*listed, *argv], "test"))


def test_a_fine_tuning_needs_training_rows(tiny_world: TinyWorld, glue: Path) -> None:
    pairs = f"dev: {glue}/STS-B/dev.tsv, text: sentence1, text_pair: sentence2, label: score, kind: regression"
    given = {"task__custom": f"{{own: {{{pairs}}}}}", "proxy__tasks": "[RTE]", "proxy__other_tasks": "[own]"}
    assert plan(tiny_world, glue, "uniform", **given).scored == ("RTE", "own")
    with pytest.raises(UserError, match=r"^proxy.evaluator='finetune': 'own' has nothing to train on"):
        plan(tiny_world, glue, "uniform", **given, proxy__evaluator="finetune")


def test_each_mapping_is_run_once_however_it_is_written(tiny_world: TinyWorld, glue: Path) -> None:
    made = plan(tiny_world, glue, "uniform", "2-4", "none", "2-4/0-1", "2-4/2-4", "last")
    assert [(g.key, g.given) for g in made.genomes] == [
        ("2-4", "uniform"),
        ("0-0", "none"),
        ("2-4/0-1", "2-4/0-1"),
        ("3-4", "last"),
    ]
    assert all(g.plan is not None for g in made.genomes), "the embedding loss is left for `none`"
    assert [g.plan.config.mapping.hidden for g in made.genomes if g.plan] == ["2-4", "0-0", "2-4", "3-4"]
    assert [g.plan.config.mapping.attention for g in made.genomes if g.plan] == [None, None, "0-1", None]
    assert made.genomes[2].mapping.file_name == "2-4_0-1"


def test_kept_layers_take_the_place_of_student_init(tiny_world: TinyWorld, glue: Path) -> None:
    made = plan(tiny_world, glue, "2-4", "follow@1-4", "0-3@2-4", "1-2@none", loss__embedding=0)
    assert [(g.key, g.start(made.base).config.student.init) for g in made.genomes] == [
        ("2-4", "uniform"),
        ("1-4@1-4", "1-4"),
        ("0-3@2-4", "0-3"),
        ("1-2@0-0", "1-2"),
        ("0-0", "uniform"),
    ]
    assert [g.plan.config.student.init for g in made.genomes if g.plan] == ["uniform", "1-4", "0-3"]
    assert plan(tiny_world, glue, "0-3@2-4").fingerprint == plan(tiny_world, glue, "2-4").fingerprint


def test_kept_layers_need_a_student_that_is_made_from_the_teacher(tiny_world: TinyWorld, glue: Path) -> None:
    own = {"student__path": tiny_world.teacher, "student__layers": "null"}
    with pytest.raises(UserError, match=r"genomes='1-2-3-4@1-2-3-4': student\.path=.* leave out the part before the @"):
        plan(tiny_world, glue, "1-2-3-4@uniform", **own)


def test_none_runs_too_where_the_yardstick_is_to_be_measured(tiny_world: TinyWorld, glue: Path) -> None:
    scales = "{SST-2: {start: 0, teacher: 1}}"
    one_task = {"proxy__tasks": "[SST-2]"}
    assert [genome.key for genome in plan(tiny_world, glue, "2-4", **one_task).genomes] == ["2-4", "0-0"]
    assert [g.key for g in plan(tiny_world, glue, "2-4", **one_task, proxy__yardstick=scales).genomes] == ["2-4"]


def test_other_tasks_are_loaded_and_do_not_count(tiny_world: TinyWorld, glue: Path) -> None:
    made = plan(tiny_world, glue, "2-4", proxy__tasks="[SST-2]", proxy__other_tasks="[RTE, sst2]")
    assert [task.spec.name for task in made.tasks] == ["SST-2", "RTE"]
    assert made.counted == ("SST-2",)
    assert made.facts["tasks"] == ["SST-2"]


@pytest.mark.parametrize(("genome", "learns"), [("0-0", False), ("0-0/0-2", True), ("1-0/0-0", True)])
def test_a_genome_without_any_loss_is_scored_untrained(
    tiny_world: TinyWorld, glue: Path, genome: str, learns: bool
) -> None:
    made = plan(tiny_world, glue, genome, loss__embedding=0)
    assert (made.genomes[0].plan is not None) == learns


CHANGES_FITNESS = [
    {"proxy__steps": 7},
    {"train__lr": 2e-3},
    {"student__init": "first"},
    {"loss__hidden": 2},
    {"proxy__tasks": "[SST-2]"},
    {"task__train_rows": 5},
    {"proxy__evaluator": "finetune"},
    {"optim__weight_decay": 0.0},
    {"proxy__folds": 3},
]
SAME_FITNESS = [
    {"seed": 5},
    {"proxy__repeats": 3},
    {"output_dir": "elsewhere"},
    {"proxy__report_at": "[2]"},
    {"proxy__other_tasks": "[RTE]"},
    {"proxy__yardstick": {task: {"start": 0.0, "teacher": 1.0} for task in ("SST-2", "MRPC", "STS-B")}},
    {"train__log_every": 1},
    {"student__attention": "eager"},
    {"proxy__keep_students": True},
    {"proxy__layer_table": True},
]


def test_the_fingerprint_changes_with_what_changes_fitness_and_with_nothing_else(
    tiny_world: TinyWorld, glue: Path
) -> None:
    base = plan(tiny_world, glue, "2-4").fingerprint
    assert plan(tiny_world, glue, "1-3").fingerprint == base, "the mapping tells evaluations apart"
    for settings in SAME_FITNESS:
        assert plan(tiny_world, glue, "2-4", **settings).fingerprint == base, settings
    others = [plan(tiny_world, glue, "2-4", **settings).fingerprint for settings in CHANGES_FITNESS]
    assert len({base, *others}) == 1 + len(CHANGES_FITNESS)
    assert code_version().startswith("0.1.0+")


def test_trackers_get_nothing_and_are_no_part_of_the_fingerprint(
    tiny_world: TinyWorld, glue: Path, tmp_path: Path
) -> None:
    with_tracker = write_ds_config(tmp_path / "with", csv_monitor={"enabled": True})
    made = plan(tiny_world, glue, "2-4", deepspeed_config=with_tracker)
    without = plan(tiny_world, glue, "2-4", deepspeed_config=write_ds_config(tmp_path / "without"))
    assert made.fingerprint == without.fingerprint
    says = "a proxy trains many students at once, and csv_monitor would take them for one run; nothing is sent to it"
    assert made.warnings == (f"{with_tracker}: {says}", *without.warnings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"genomes": "[2-4, 2-4-1]"}, "genomes='2-4-1' has 3 layers, but the student has 2"),
        ({"genomes": "[2-4/]"}, "nothing after the slash"),
        ({"genomes": "[2-4, random-each-step]"}, "genomes='random-each-step' is not a fixed mapping"),
        ({"genomes": "[]"}, "name at least one layer mapping"),
        ({"proxy__tasks": "[SST3, MRPC]"}, "did you mean"),
        ({"proxy__tasks": "[SQuAD-v2]"}, "proxy.evaluator=finetune"),
        ({"proxy__other_tasks": "[SQuAD-v2]"}, "proxy.other_tasks='SQuAD-v2'"),
        ({"proxy__folds": 1}, "proxy.folds=1"),
        ({"proxy__yardstick": "{SST-2: {start: 0.9, teacher: 0.8}}"}, "proxy.yardstick.SST-2=0.8"),
        ({"proxy__yardstick": "{SST-2: {start: 0.7, teacher: 0.8}}"}, "proxy.tasks are SST-2, MRPC, STS-B"),
        ({"proxy__report_at": "[6]"}, "proxy.report_at=6"),
        ({"task__data_dir": "nowhere"}, "task.data_dir='nowhere'"),
        ({"data__eval_sequences": 8}, "data.eval_sequences=8"),
    ],
)
def test_mistakes_name_key_and_value(tiny_world: TinyWorld, glue: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as error:
        plan(tiny_world, glue, *([] if "genomes" in settings else ["2-4"]), **settings)
    assert says in str(error.value)


def test_a_batch_that_cannot_be_split_is_found_before_anything_is_trained(
    tiny_world: TinyWorld, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"proxy\.batch=9 is not divisible by 2 ranks"):
        plan(tiny_world, glue, "2-4", proxy__evaluator="finetune", proxy__batch=9)
    plan(tiny_world, glue, "2-4", proxy__evaluator="probe", proxy__batch=9)


def test_a_student_by_path_needs_no_init() -> None:
    def config(*argv: str) -> ProxyJobConfig:
        return parse_config(ProxyJobConfig, ["--genomes", '["2-4"]', *argv], "test")

    assert config().student.init == "uniform"
    assert config("--student.path", "somewhere").student.init is None
    with pytest.raises(UserError, match=r"student\.init='first': remove it"):
        config("--student.path", "somewhere", "--student.init", "first")


def test_tasks_of_glue_that_are_missing_are_named(tiny_world: TinyWorld, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "SST-2").symlink_to(glue / "SST-2")
    made = plan(tiny_world, tmp_path, "2-4", proxy__tasks="[glue]")
    assert [task.spec.name for task in made.tasks] == ["SST-2"]
    assert "MNLI" in made.warnings[0]


def test_another_metric_of_a_custom_task_is_another_fitness(tiny_world: TinyWorld, tmp_path: Path) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "river\ta\nstone\tb\n" * 4)
    custom = {"train": str(rows), "dev": str(rows)}
    found = {
        plan(
            tiny_world, tmp_path, "2-4", proxy__tasks="[mine]", task__custom=json.dumps({"mine": {**custom, **metrics}})
        ).fingerprint
        for metrics in ({}, {"metrics": ["f1"]})
    }
    assert len(found) == 2


@pytest.mark.parametrize("words", [["1-2", "uniform"], ['["1-2", "uniform"]'], ["[1-2, uniform]"]])
def test_genomes_are_words_or_a_list(words: list[str]) -> None:
    config = parse_config(ProxyJobConfig, ["--seed", "1", "--genomes", *words, "--output_dir", "x"], "test")
    assert (config.genomes, config.seed) == (["1-2", "uniform"], 1)


def result(genome: str, seed: int, fitness: float, fingerprint: str = "f") -> dict[str, object]:
    scores = {"SST-2": fitness, "STS-B": fitness}
    return {
        "genome": genome,
        "seed": seed,
        "fitness": fitness,
        "scores": scores,
        "fingerprint": fingerprint,
        "steps": 6,
    }


def test_results_of_another_fingerprint_do_not_count(tmp_path: Path) -> None:
    log = tmp_path / "records.jsonl"
    lines = [result("1-2", 0, 0.5), result("1-2", 0, 0.6), result("1-2", 1, 0.7, "other")]
    log.write_text("\n".join(format_record("result", **line) for line in lines) + "\n@record {torn")
    assert {key: r["fitness"] for key, r in earlier_results(log, "f").items()} == {("1-2", 0): 0.6}
    assert earlier_results(tmp_path / "none", "f") == {}


def test_the_table_shows_the_best_first_with_its_noise() -> None:
    results = [result("1-2", 0, 0.5), result("1-2", 1, 0.7), result("2-4", 0, 0.8), result("2-4", 1, 0.82)]
    scales = {"SST-2": TaskScale(start=0.3, teacher=0.9), "STS-B": TaskScale(start=0.2, teacher=0.1, weight=0.0)}
    lines = fitness_table(
        results, {"2-4": "uniform", "1-2": "1-2"}, ["3-3  seed 0: diverged"], scales, tasks=list(scales)
    ).splitlines()
    assert lines[0].split() == ["genome", "SST-2", "(STS-B)", "fitness", "seeds"], "in brackets: it does not count"
    assert " ".join(lines[1].split()) == "2-4 uniform 0.8100 ± 0.0141 0.8100 ± 0.0141 0.8100 ± 0.0141 2"
    assert " ".join(lines[2].split()) == "1-2 0.6000 ± 0.1414 0.6000 ± 0.1414 0.6000 ± 0.1414 2"
    assert [line.split() for line in lines[3:5]] == [
        ["start", "0.3000", "0.2000", "0.0000"],
        ["teacher", "0.9000", "0.1000", "1.0000"],
    ]
    assert lines[5] == "3-3  seed 0: diverged"
    signal = signal_of(results)
    assert signal is not None
    assert signal.ratio == pytest.approx(((0.81 - 0.6) ** 2 / 2) / ((0.02**2 / 2 + 0.2**2 / 2) / 2))
    assert signal_of([*results, *({**result("0-0", seed, 0.5), "steps": 0} for seed in (0, 1))]) == signal
    assert signal_of(results[:2]) is None


class FromTheStart(HiddenMapped):
    name = "from_the_start"

    def __call__(self, inputs: StepInputs, weights: Mapping[str, float]) -> Evaluated:
        raise AssertionError("nothing is trained here")


def judge(model: object) -> dict[str, float]:
    raise AssertionError("nothing is scored here")


def other_judge(model: object) -> dict[str, float]:
    raise AssertionError("nor here")


def test_own_losses_and_an_own_evaluator_are_part_of_the_fingerprint(tiny_world: TinyWorld, glue: Path) -> None:
    settings = {
        "genomes": ["2-4"],
        "teacher.path": tiny_world.teacher,
        "student.layers": 2,
        "data.path": tiny_world.corpus,
        "task.data_dir": glue,
        "train.warmup_steps": 2,
        "proxy.steps": 6,
    }

    def made(tasks: list[str], losses: OwnLosses = NO_LOSSES, evaluator: OwnEvaluator | None = None) -> ProxyPlan:
        return make_proxy_plan(read_config(ProxyJobConfig, settings, {"proxy.tasks": tasks}), losses, evaluator)

    plans = [
        made(["SST-2"]),
        made(["SST-2"], {FromTheStart: 1.0}),
        made(["SST-2"], {FromTheStart: 2.0}),
        made(["mine"], evaluator=judge),
        made(["ours"], evaluator=judge),
        made(["mine"], evaluator=other_judge),
    ]
    assert len({one.fingerprint for one in plans}) == len(plans)
    assert [one.counted for one in plans] == [("SST-2",)] * 3 + [("mine",), ("ours",), ("mine",)]
    assert plans[3].tasks == ()
    assert plans[3].facts["tasks"] == ["mine"]
    terms = plans[1].genomes[0].plan.losses.term_names
    assert terms[-2:] == ("from_the_start/1-2", "from_the_start/2-4")
    with pytest.raises(UserError, match="task 'mine'"):
        made(["mine"])


class Embedded(EmbeddingLoss):
    name = "embedded"


@pytest.mark.parametrize(("own", "learns"), [(FromTheStart, False), (Embedded, True)])
def test_a_genome_without_pairs_learns_from_own_losses_without_layers(
    own: type[Loss], learns: bool, tiny_world: TinyWorld, glue: Path
) -> None:
    settings = {"genomes": ["none"], "teacher.path": tiny_world.teacher, "student.layers": 2}
    settings |= {"data.path": tiny_world.corpus, "task.data_dir": glue, "loss.embedding": 0}
    genome = make_proxy_plan(read_config(ProxyJobConfig, settings), {own: 1.0}).genomes[0]
    assert (genome.plan is not None) == learns
