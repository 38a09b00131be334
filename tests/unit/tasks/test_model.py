"""Task heads around encoders, and the losses of TaskModule against plain formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from tiny_encoders import FAMILIES, VOCAB, make_batch, save_tiny, tiny_config
from transformers import AutoModelForSequenceClassification

from engine.config.finetune import MappingConfig, TaskLossConfig
from engine.data.batch import Counts, TaskBatch
from engine.errors import UserError
from engine.hub.config import load_config
from engine.losses.loss_set import LossSet
from engine.mapping import parse_mapping
from engine.models.capture import capture
from engine.models.features import Features, Wanted
from engine.models.fit import longest_input
from engine.models.hub import shape_of
from engine.models.projections import Projections
from engine.tasks.model import head_remarks, load_task_model, model_folder
from engine.tasks.module import TaskModule, labels_loss, logits_loss
from engine.tasks.specs import BUILT_IN, TaskSpec

SST2, MNLI, STSB, SQUAD = (BUILT_IN[name] for name in ("SST-2", "MNLI", "STS-B", "SQuAD-v1.1"))


def load(path: str, spec: TaskSpec = SST2, *, seed: int = 0, dropout: float = 0.0, head_required: bool = False):
    return load_task_model(
        path, key="model.path", spec=spec, dropout=dropout, seed=seed, backend="sdpa", head_required=head_required
    )


def task_batch(kind: str, *, padded: bool = True) -> TaskBatch:
    batch = make_batch(sequences=3, length=11, padded=padded)
    targets = {
        "classification": torch.tensor([1, 0, 1]),
        "regression": torch.tensor([0.5, 4.0, 2.5]),
        "span": torch.tensor([[1, 2], [0, 0], [3, 3]]),
    }[kind]
    return TaskBatch(batch.input_ids, batch.attention_mask, None, batch.counts, targets=targets, rows=torch.arange(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_heads_of_every_kind(family: str, tmp_path: Path) -> None:
    path = save_tiny(family, tmp_path / family)
    for spec, shape in ((SST2, (3, 2)), (MNLI, (3, 3)), (STSB, (3, 1)), (SQUAD, (3, 11, 2))):
        model = load(path, spec)
        assert model.training
        logits = TaskModule(model.eval(), kind=spec.kind)(task_batch(spec.kind))
        assert logits.shape == shape
        assert logits.dtype == torch.float32


def test_a_new_head_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path / "bert")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load(path, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = load(path, seed=3).state_dict(), load(path, seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    different = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert different == {"classifier.weight", "bert.pooler.dense.weight"}  # exported students have no pooler


def test_dropout_is_set_in_encoder_and_head_and_labels_in_the_configuration(tmp_path: Path) -> None:
    model = load(save_tiny("bert", tmp_path / "bert"), MNLI, dropout=0.3)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3}
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}


def test_a_saved_head_is_kept_for_its_own_labels_only(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path / "bert")
    tuned = load(path, BUILT_IN["RTE"], seed=1)
    tuned.save_pretrained(tmp_path / "tuned")
    same = load(str(tmp_path / "tuned"), BUILT_IN["QNLI"], seed=2)  # the same two labels
    assert torch.equal(same.classifier.weight, tuned.classifier.weight)
    for spec in (SST2, MNLI):  # two other labels; three
        other = load(str(tmp_path / "tuned"), spec, seed=2)
        assert other.classifier.weight.shape == (len(spec.labels), 48)
        assert not torch.equal(other.classifier.weight[:2], tuned.classifier.weight)
        assert torch.equal(other.bert.pooler.dense.weight, tuned.bert.pooler.dense.weight)
        assert torch.equal(other.bert.embeddings.word_embeddings.weight, tuned.bert.embeddings.word_embeddings.weight)
    teacher = load(str(tmp_path / "tuned"), BUILT_IN["RTE"], head_required=True)
    assert torch.equal(teacher.classifier.weight, tuned.classifier.weight)


def test_a_teacher_without_the_tasks_head_is_refused(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path / "bert")
    with pytest.raises(UserError, match="saved without a sequence-classification head"):
        load(path, head_required=True)
    load(path, BUILT_IN["RTE"]).save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match="its labels are entailment, not_entailment, those of SST-2 are negative, pos"):
        load(str(tmp_path / "tuned"), SST2, head_required=True)
    with pytest.raises(UserError, match="2 outputs, the regression STS-B needs 1"):
        load(str(tmp_path / "tuned"), STSB, head_required=True)


def renamed(path: str, names: list[str]) -> str:
    """The model folder with these names of its outputs."""
    file = Path(path) / "config.json"
    config = json.loads(file.read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    file.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("teacher", [False, True])
def test_outputs_are_put_into_the_order_of_the_task(family: str, teacher: bool, tmp_path: Path) -> None:
    load(save_tiny(family, tmp_path / "body"), MNLI).save_pretrained(tmp_path / "tuned")
    module = TaskModule(load(str(tmp_path / "tuned"), MNLI).eval(), kind="classification")
    before = module(task_batch("classification"))
    path = renamed(str(tmp_path / "tuned"), ["CONTRADICTION", "Entailment", "neutral"])
    model = load(path, MNLI, seed=5, head_required=teacher)
    after = TaskModule(model.eval(), kind="classification")(task_batch("classification"))
    assert torch.equal(after, before[:, [1, 2, 0]])
    assert not torch.equal(after, before)
    assert model.config.id2label == dict(enumerate(MNLI.labels))


def test_numbered_outputs_are_a_teachers_and_no_students(tmp_path: Path) -> None:
    load(save_tiny("bert", tmp_path / "body"), MNLI).save_pretrained(tmp_path / "tuned")
    tuned = load(str(tmp_path / "tuned"), MNLI)
    path = renamed(str(tmp_path / "tuned"), ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert torch.equal(load(path, MNLI, head_required=True).classifier.weight, tuned.classifier.weight)
    assert not torch.equal(load(path, MNLI, seed=3).classifier.weight, tuned.classifier.weight)
    with pytest.raises(UserError, match="its labels are LABEL_0, LABEL_1, LABEL_2, those of SST-2 are negative, pos"):
        load(path, SST2, head_required=True)


def test_remarks_on_heads(tmp_path: Path) -> None:
    def remarks(names: list[str], spec: TaskSpec = MNLI) -> list[str]:
        config = load_config(renamed(str(tmp_path / "tuned"), names), "model.path")
        return head_remarks("PATH", key="model.path", config=config, spec=spec)

    load(save_tiny("bert", tmp_path / "body"), MNLI).save_pretrained(tmp_path / "tuned")
    assert remarks(["entailment", "neutral", "contradiction"]) == []
    assert remarks(["neutral", "entailment", "contradiction"], STSB) == []
    (said,) = remarks(["contradiction", "neutral", "entailment"])
    assert (
        "its outputs are contradiction, neutral, entailment, those of MNLI entailment, neutral, contradiction" in said
    )
    assert said.endswith("they are put into this order")
    (said,) = remarks(["LABEL_0", "LABEL_1", "LABEL_2"])
    assert said.endswith("its head is replaced by a new one")


def test_missing_encoder_weights_are_an_error(tmp_path: Path) -> None:
    path = Path(save_tiny("bert", tmp_path / "bert"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"model.path=.*weights are missing.*encoder\.layer\.4"):
        load(str(path))


def test_run_directories_stand_for_their_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"launch/export\.py --run"):
        model_folder(str(run), key="model.path")
    save_tiny("bert", run / "student")
    assert model_folder(str(run), key="model.path") == str(run / "student")
    assert model_folder(str(run / "student"), key="model.path") == str(run / "student")
    assert AutoModelForSequenceClassification.from_pretrained(run / "student") is not None


def test_positions_that_start_behind_the_pad_token() -> None:
    assert longest_input(tiny_config("bert")) == 40
    assert longest_input(tiny_config("roberta")) == 38


@pytest.mark.parametrize("kind", ["classification", "regression", "span"])
@pytest.mark.parametrize("padded", [False, True])
def test_labels_loss_is_the_plain_formula_over_real_tokens(kind: str, padded: bool) -> None:
    batch = task_batch(kind, padded=padded)
    shape = {"classification": (3, 2), "regression": (3, 1), "span": (3, 11, 2)}[kind]
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = [11] * 3 if batch.attention_mask is None else batch.attention_mask.sum(1).tolist()
    want = 0.0
    for row, length in enumerate(lengths):
        values, target = logits[row].numpy(), batch.targets[row].numpy()
        if kind == "classification":
            want -= log_softmax(values)[target]
        elif kind == "regression":
            want += (values[0] - target) ** 2
        else:
            want -= sum(log_softmax(values[:length, end])[target[end]] for end in (0, 1)) / 2
    assert labels_loss(logits, batch, kind).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["classification", "regression", "span"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_loss_is_the_plain_formula_and_has_finite_gradients(kind: str, temperature: float) -> None:
    batch = task_batch(kind)
    shape = {"classification": (3, 2), "regression": (3, 1), "span": (3, 11, 2)}[kind]
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "span":  # whatever a model says of pads must not count
        pads = batch.attention_mask == 0
        student[pads], teacher[pads] = torch.nan, torch.inf
    student.requires_grad_()
    got = logits_loss(student, teacher, batch, kind, temperature)
    got.backward()
    lengths = batch.attention_mask.sum(1).tolist()
    assert min(lengths) < 11
    want = 0.0
    for row, length in enumerate(lengths):
        s, t = student[row].detach().numpy(), teacher[row].numpy()
        if kind == "regression":
            want += (s[0] - t[0]) ** 2
            continue
        columns = [(s, t)] if kind == "classification" else [(s[:length, e], t[:length, e]) for e in (0, 1)]
        for log_s, log_t in ((log_softmax(a / temperature), log_softmax(b / temperature)) for a, b in columns):
            want += float((np.exp(log_t) * (log_t - log_s)).sum()) * temperature**2 / len(columns)
    assert got.item() == pytest.approx(want, rel=1e-9)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0
    assert logits_loss(student, student.detach(), batch, kind, temperature).item() == pytest.approx(0.0, abs=1e-12)


def full_module(tmp_path: Path) -> tuple[TaskModule, TaskLossConfig]:
    """A student with the task's loss, logits, hidden states and attention scores of a teacher."""
    student = load(save_tiny("bert", tmp_path / "student"), seed=1)
    loss = TaskLossConfig(hidden=0.5, attention=0.25, logits=2.0, temperature=2.0)
    shape = shape_of(student.config, has_mlm_head=False)
    uniform = parse_mapping("0-2-0-4", key="mapping.hidden", student_layers=4, teacher_layers=4)
    losses = LossSet(
        replace(loss, logits=0.0),
        MappingConfig(hidden="0-2-0-4"),
        hidden_map=uniform,
        attention_map=uniform,
        student=shape,
        teacher=shape,
        mlm_probability=0.0,
    )
    projections = Projections(loss, student_width=48, teacher_width=48, layers=losses.projected_layers)
    module = TaskModule(
        student, kind="classification", loss=loss, with_teacher=True, losses=losses, projections=projections
    )
    return module.eval(), loss


def test_total_is_the_weighted_sum_and_does_not_depend_on_the_split(tmp_path: Path) -> None:
    module, _ = full_module(tmp_path)
    teacher = load(save_tiny("bert", tmp_path / "teacher", seed=9), seed=2).eval()
    wanted = module.losses.wanted_teacher | Wanted(task_logits=True)
    batch = task_batch("classification")

    def features(part: TaskBatch) -> Features:
        with torch.no_grad():
            return capture(teacher, part, wanted)

    def part(rows: slice) -> TaskBatch:
        mask = batch.attention_mask[rows]
        sizes = mask.sum(1)
        counts = Counts(len(mask), int(sizes.sum()), int((sizes**2).sum()), mask.numel(), mask.numel() * 11)
        return TaskBatch(batch.input_ids[rows], mask, None, counts, targets=batch.targets[rows])

    whole = part(slice(None))
    total, terms = module(whole, features(whole), whole.counts)
    assert module.term_names == ("labels", "logits", "hidden/2-2", "hidden/4-4", "attention/2-2", "attention/4-4")
    assert module.coefficients == (1.0, 2.0, 0.25, 0.25, 0.125, 0.125)
    assert module.observed_names == ("attention_target/2-2", "attention_target/4-4")
    weighted = torch.tensor(module.coefficients) * terms[: len(module.coefficients)]
    assert total.item() == pytest.approx(float(weighted.sum()), rel=1e-6)
    total.backward()
    assert module.student.classifier.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in module.projections.parameters())
    halves = [part(slice(0, 1)), part(slice(1, 3))]
    split = sum(module(half, features(half), whole.counts)[0].item() for half in halves)
    assert split == pytest.approx(total.item(), rel=1e-5)


def test_loss_without_teacher_is_cross_entropy_of_the_batch(tmp_path: Path) -> None:
    module = TaskModule(load(save_tiny("bert", tmp_path / "b")).eval(), kind="classification")
    batch = task_batch("classification")
    total, terms = module(batch, None, Counts(sequences=3))
    assert module.term_names == ("labels",)
    want = F.cross_entropy(module(batch), batch.targets)
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    assert terms.tolist() == [total.item()]
    assert not terms.requires_grad
    assert batch.input_ids.max() < VOCAB
