"""What a fine-tuning job checks and works out before any model is loaded; its command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from squad_sample import write_squad_sample
from tiny_world import TinyWorld

from engine.config.finetune import FinetuneConfig
from engine.config.identity import describe_changes
from engine.config.reading import parse_config
from engine.errors import UserError
from engine.jobs.finetune.plan import FinetunePlan, make_finetune_plan, unit_identity
from engine.tasks.encode import encode_task
from engine.tasks.evaluation import Best, TaskEvaluation
from engine.tasks.model import load_task_model
from engine.tasks.specs import BUILT_IN
from engine.tasks.train import task_train_config


@pytest.fixture(scope="module")
def tuned(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with RTE/, a model with RTE's head."""
    folder = tmp_path_factory.mktemp("tuned")
    model = load_task_model(str(tiny_world.teacher), key="x", spec=BUILT_IN["RTE"], dropout=0.0, seed=0, backend="sdpa")
    shutil.copytree(tiny_world.teacher, folder / "RTE")
    model.save_pretrained(folder / "RTE")
    return folder


def parsed(*argv: str) -> FinetuneConfig:
    return parse_config(FinetuneConfig, list(argv), "test")


@pytest.fixture
def plan_of(tiny_world: TinyWorld, glue: Path, tmp_path: Path):
    def plan(*argv: str) -> FinetunePlan:
        usual = ["--model.path", str(tiny_world.teacher), "--task.data_dir", str(glue), "--output_dir", str(tmp_path)]
        return make_finetune_plan(parsed(*usual, *argv))

    return plan


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["SST-2"], ["SST-2"]),
        (["[SST-2, MRPC]"], ["SST-2", "MRPC"]),
        (["SST-2,MRPC"], ["SST-2", "MRPC"]),
        (["SST-2, SST-2"], ["SST-2"]),
    ],
)
def test_names_on_the_command_line(words: list[str], names: list[str]) -> None:
    assert parsed("--task.name", *words).task.names == names


def test_lists_grids_and_tasks_of_your_own_on_the_command_line(tmp_path: Path) -> None:
    config = parsed(
        "--task.seeds", "[0, 1, 2]", "--task.grid", "{lr: [2e-5, 5e-5], batch: [16, 32]}", "--task.predict",
        "--task.custom", "{mine: {train: a.tsv, dev: b.tsv, labels: ['no', 'yes']}}", "--dry_run",
    )  # fmt: skip
    assert config.task.seeds == [0, 1, 2]
    assert config.task.grid == {"lr": [2e-5, 5e-5], "batch": [16.0, 32.0]}
    assert config.task.predict is config.dry_run is True
    assert config.task.custom["mine"].dev == "b.tsv"
    assert config.task.custom["mine"].labels == ["no", "yes"]
    path = tmp_path / "f.yaml"
    path.write_text("task:\n  name: [RTE]\n  seeds: [3]\n  grid: {lr: [2e-5]}\n  custom: {m: {train: a, dev: b}}\n")
    from_file = parsed("--config", str(path), "--task.seeds", "[4]").task
    assert (from_file.names, from_file.seeds, from_file.grid) == (["RTE"], [4], {"lr": [2e-5]})
    assert from_file.custom["m"].train == "a"


MISTAKES = [
    (["--task.nmae", "RTE"], "unknown setting 'task.nmae'; did you mean 'task.name'?"),
    (["--task.seed", "0"], "unknown setting 'task.seed'; did you mean 'task.seeds'?"),
    (["--task.seeds", "[0, 0]"], "task.seeds=[0, 0]: each seed once"),
    (["--task.seeds", "[0, x]"], "task.seeds, entry 2: expected a whole number, got x"),
    (["--task.epochs", "many"], "task.epochs: expected a number, got many"),
    (["--task.grid", "{rate: [1]}"], "only lr, epochs, batch can be searched"),
    (["--task.grid", "{lr: [1]}", "--task.lr", "1"], "task.lr=1.0: remove it: task.grid already sets lr"),
    (["--task.custom", "{m: {train: a, devv: b}}"], "devv"),
    (["--loss.hidden", "1"], "loss.hidden=1.0: needs a teacher: set teacher.path"),
    (["--loss.labels", "0"], "must be > 0 without a teacher"),
    (["--mapping.hidden", "random-each-step"], "only launch/distill.py draws layers; write a fixed mapping"),
]


@pytest.mark.parametrize(("argv", "says"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_on_the_command_line(argv: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(*argv)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


PLAN_MISTAKES = [
    (["--task.name", "RTEE"], "did you mean 'RTE'?"),
    (["--task.data_dir", "nowhere"], "task.data_dir='nowhere': no such folder"),
    (["--model.path", "nowhere"], "model.path='nowhere'"),
    (["--task.name", "RTE", "--task.seq_len", "65"], "takes 64 tokens at most; use seq_len=64 or less"),
    (["--teacher.path", "nowhere", "--task.name", "RTE"], "teacher.path='nowhere'"),
    (["--teacher.path", "nowhere", "--task.name", "RTE,SST-2"], "write {task} in it"),
    (["--optim.name", "lamb", "--deepspeed_config", "ds_configs/zero1_fp32.json"], "optim.name='lamb' with ZeRO"),
    (["--deepspeed_config", "nowhere.json"], "nowhere.json"),
    (["--task.name", "SST-2", "--task.custom", "{m: {train: a.tsv, dev: b.tsv}}", "--task.name", "m"], "a.tsv"),
]


@pytest.mark.parametrize(("argv", "says"), PLAN_MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_that_the_files_tell(plan_of, argv: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        plan_of(*argv)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_retrieval_cannot_be_trained_on(plan_of, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.name: 'faq' has nothing to train on; `python launch/score.py`"):
        plan_of("--task.name", "faq", "--task.custom", f"{{faq: {{kind: retrieval, folder: {tmp_path}}}}}")


def test_a_missing_file_is_named(plan_of, glue: Path, tmp_path: Path) -> None:
    shutil.copytree(glue / "RTE", tmp_path / "data" / "RTE")
    (tmp_path / "data" / "RTE" / "dev.tsv").unlink()
    with pytest.raises(UserError, match=r"RTE.dev\.tsv"):
        plan_of("--task.data_dir", str(tmp_path / "data"), "--task.name", "RTE")


def test_indivisible_batches_are_named_as_the_user_wrote_them(plan_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RTE: task\.batch=7 is not divisible by 2 ranks"):
        plan_of("--task.name", "RTE", "--task.batch", "7")
    with pytest.raises(UserError, match=r"RTE: task\.grid\.batch=7 is not divisible"):
        plan_of("--task.name", "RTE", "--task.grid", "{batch: [8, 7]}")


def test_units_are_tasks_times_grid_times_seeds(plan_of, tmp_path: Path) -> None:
    argv = ["--task.name", "RTE,SST-2", "--task.grid", "{batch: [4, 8, 4], lr: [2e-5, 1e-4]}", "--task.seeds", "[0, 5]"]
    plan = plan_of(*argv)
    assert len(plan.units) == 2 * 4 * 2
    assert len({unit.folder for unit in plan.units}) == 16
    first = plan.units[0]
    assert first.folder == tmp_path / "RTE" / "lr2e-05-batch4" / "seed-0"
    assert first.name == "RTE, lr 2e-05, batch 4, seed 0"
    assert (first.at.lr, first.at.batch, first.at.epochs) == (2e-5, 4, BUILT_IN["RTE"].defaults.epochs)
    assert set(plan.executions) == {4, 8}
    alone = plan_of("--task.name", "RTE").units
    assert [unit.folder for unit in alone] == [tmp_path / "RTE" / "seed-0"]


def test_default_length_is_cut_to_the_model_and_steps_follow_the_rows(plan_of) -> None:
    plan = plan_of("--task.name", "RTE", "--task.epochs", "2.5", "--task.batch", "8", "--task.warmup_share", "0.3")
    unit = plan.units[0]
    assert unit.task.seq_len == 64  # the default is 128
    train = plan.train_config(unit, 24)
    assert train.steps == 8  # 60 rows in batches of 8
    assert train.warmup_steps == 3
    assert train.global_batch == 8


def test_the_common_schedule() -> None:
    train = task_train_config(100, epochs=0.1, lr=1e-4, batch=32)
    assert (train.steps, train.warmup_steps, train.log_every, train.eval_every) == (1, 1, 1, 0)
    assert task_train_config(440, epochs=1.1, lr=1e-4, batch=4).steps == 121


def identity_of(plan: FinetunePlan, *, teacher: Any = None) -> dict[str, Any]:
    found = unit_identity(plan, plan.units[0])
    return json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        (["--train.log_every", "3", "--train.save_every", "5", "--task.eval_every", "2", "--task.predict"], []),
        (["--loss.temperature", "2", "--model.attention", "eager", "--loss.logits", "3"], []),
        (["--task.lr", "1e-3"], ["task.lr"]),
        (["--task.dropout", "0.2", "--train.schedule", "cosine"], ["task.dropout", "train.schedule"]),
        (["--task.train_rows", "20"], ["task.rows_sha256"]),
        (["--task.patience", "2", "--task.eval_every", "2"], ["task.eval_every", "task.patience"]),
        (["--optim.weight_decay", "0.1"], ["optim.weight_decay"]),
        (["--task.seq_len", "32"], ["task.seq_len"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_identity_holds_what_is_computed_and_nothing_else(plan_of, argv: list[str], changed: list[str]) -> None:
    before, after = identity_of(plan_of("--task.name", "RTE")), identity_of(plan_of("--task.name", "RTE", *argv))
    assert [line.partition(":")[0] for line in describe_changes(before, after)] == changed


def test_a_grid_point_is_the_same_fine_tuning_as_its_values_alone(plan_of) -> None:
    grid = plan_of("--task.name", "RTE", "--task.grid", "{lr: [2e-5]}", "--task.seeds", "[0, 1]")
    alone = plan_of("--task.name", "RTE", "--task.lr", "2e-5")
    assert identity_of(grid) == identity_of(alone)
    assert grid.unit_config(grid.units[0]).task == replace(
        alone.config.task, name=["RTE"], epochs=10, batch=16, seq_len=64
    )


def test_replaced_weights_change_the_identity(plan_of, tiny_world: TinyWorld, tmp_path: Path) -> None:
    before = identity_of(plan_of("--task.name", "RTE"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_world.teacher, copy)
    assert identity_of(plan_of("--task.name", "RTE", "--model.path", str(copy))) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    after = identity_of(plan_of("--task.name", "RTE", "--model.path", str(copy)))
    assert [line.partition(":")[0] for line in describe_changes(before, after)] == ["model.weights_sha256"]


def test_a_task_teacher_is_checked_before_it_is_loaded(plan_of, tuned: Path, tiny_world: TinyWorld) -> None:
    pattern = str(tuned / "{task}")
    plan = plan_of("--task.name", "RTE", "--teacher.path", pattern, "--loss.hidden", "1", "--mapping.hidden", "0-2-0-4")
    teacher = plan.tasks[0].teacher
    assert teacher is not None
    assert teacher.losses is not None
    assert teacher.losses.term_names == ("hidden/2-2", "hidden/4-4")
    identity = identity_of(plan)
    assert identity["mapping.hidden_resolved"] == "0-2-0-4"
    assert "teacher.weights_sha256" in identity
    logits_only = plan_of("--task.name", "RTE", "--teacher.path", pattern).tasks[0].teacher
    assert logits_only is not None
    assert logits_only.losses is None
    with pytest.raises(UserError, match="cannot teach RTE: it was saved without"):
        plan_of("--task.name", "RTE", "--teacher.path", str(tiny_world.teacher))
    with pytest.raises(UserError, match="those of SST-2 are negative, positive"):
        plan_of("--task.name", "SST-2", "--teacher.path", str(tuned / "RTE"))
    with pytest.raises(UserError, match="every loss towards the teacher is 0"):
        plan_of("--task.name", "RTE", "--teacher.path", pattern, "--loss.logits", "0")


def test_a_teacher_with_another_vocabulary_is_refused(plan_of, tuned: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tuned / "RTE", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["the"], vocab["a"] = vocab["a"], vocab["the"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another vocabulary"):
        plan_of("--task.name", "RTE", "--teacher.path", str(other))


def test_settings_without_effect_are_named(plan_of) -> None:
    plan = plan_of("--task.name", "RTE", "--loss.temperature", "2", "--mapping.hidden", "last")
    assert "loss.temperature has no effect without teacher.path" in plan.warnings
    assert "mapping has no effect without teacher.path" in plan.warnings
    assert plan_of("--task.name", "RTE").warnings == ()


def test_encoded_tasks_hold_every_split(plan_of, tmp_path: Path) -> None:
    plan = plan_of("--task.name", "MNLI", "--task.predict")
    task = encode_task(plan.tasks[0].data, plan.tokenizer, seq_len=64)
    assert set(task.parts) == {"dev_matched", "dev_mismatched", "test_matched", "test_mismatched"}
    assert len(task.train) == 24
    assert task.rows("test_matched").targets is None
    write_squad_sample(tmp_path / "SQuAD", v2=False)
    squad = plan_of("--task.name", "squad", "--task.data_dir", str(tmp_path), "--task.doc_stride", "16")
    spans = encode_task(squad.tasks[0].data, squad.tokenizer, seq_len=48, doc_stride=16)
    assert len(spans.rows("dev")) > len(spans.splits["dev"]) == 18
    assert len(spans.train) > 36


def evaluation(**settings: Any) -> TaskEvaluation:
    task: Any = type("Rows", (), {"train": range(20)})()
    trainee: Any = None
    return TaskEvaluation(trainee, task, batch_size=1, global_batch=8, **settings)


def test_scores_come_once_per_epoch_and_at_the_end() -> None:
    once = evaluation()
    assert [step for step in range(1, 11) if once.due(step, last=step == 9)] == [3, 5, 8, 9, 10]  # 20 rows, 8 a step
    often = evaluation(every=4)
    assert [step for step in range(1, 11) if often.due(step, last=step == 10)] == [4, 8, 10]


def test_early_stopping_survives_a_checkpoint() -> None:
    first = evaluation(patience=2)
    first.best, first.bad = Best(0.7, 5, {"accuracy": 0.7}), 1
    second = evaluation(patience=2)
    second.restore(first.state())
    assert (second.best, second.bad, second.enough) == (first.best, 1, False)
    assert first.state()["keep_step"] == 5
    second.bad = 2
    assert second.enough
    assert evaluation().state()["keep_step"] is None
