"""What a student's layers know of the teacher's, against scikit-learn on states that transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from tiny_encoders import VOCAB, batch_with_lengths, tiny_config, tiny_model
from transformers import PreTrainedModel

from engine.data.batch import Batch, Counts
from engine.jobs.proxy import layer_table as module
from engine.jobs.proxy.layer_table import LayerTables, divide, layer_table
from engine.losses.measure import TeacherSlice
from engine.models.capture import capture
from engine.models.features import Features, Wanted
from engine.models.install import install
from engine.models.moments import RIDGE
from engine.models.student import new_model
from engine.records.layer_table import layer_text, mean_table

CPU = torch.device("cpu")


def batches(count: int = 12) -> list[Batch]:
    """Of 8 sequences each, most of them padded."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        batch = batch_with_lengths(sequences=8, length=20)
        mask = batch.attention_mask
        assert mask is not None
        ids = torch.randint(5, VOCAB, mask.shape, generator=generator) * mask + (1 - mask)
        counts = Counts.from_lengths(np.array(batch.lengths))
        found.append(replace(batch, input_ids=ids, counts=counts))
    return found


def passes(model: PreTrainedModel, *, unpadded: bool = False) -> Callable[[Batch], Features]:
    wanted = Wanted(hidden=frozenset(range(5)))

    def run(batch: Batch) -> Features:
        with torch.no_grad():
            return capture(model, batch, wanted, unpadded=unpadded)

    return run


def encoder(family: str = "bert", *, seed: int = 1) -> PreTrainedModel:
    model = tiny_model(family, seed=seed)
    install(model, "eager")
    return model


def narrow_student() -> PreTrainedModel:
    config = tiny_config("bert")
    config.hidden_size, config.num_hidden_layers = 24, 2
    student = new_model(config, False, 0)
    install(student, "eager")
    return student.train()


def states(model: PreTrainedModel, on: list[Batch], layer: int) -> list[np.ndarray[Any, Any]]:
    """By sequence, its real tokens in float64."""
    found = []
    with torch.no_grad():
        for batch in on:
            hidden = model.eval()(batch.input_ids, batch.attention_mask, output_hidden_states=True).hidden_states
            found += [row[:n].double().numpy() for row, n in zip(hidden[layer], batch.lengths or (), strict=True)]
    return found


@pytest.mark.parametrize("unpadded", [False, True])
def test_shares_are_those_of_scikit_learn_on_sequences_that_were_not_fitted_on(unpadded: bool) -> None:
    """Whether or not the teacher ran with its pads, and however much the student had dropout before."""
    teacher, student, on = encoder(), narrow_student(), batches()
    table = layer_table(student, divide(TeacherSlice(on, passes(teacher, unpadded=unpadded), CPU)), CPU)
    assert (len(table), {len(row) for row in table}) == (3, {5})
    for m, row in enumerate(table):
        for n, share in enumerate(row):
            x, y = states(student, on, m), states(teacher, on, n)
            rest = [i for i in range(len(x)) if i % 5 != 4]
            fit_x, fit_y = (np.concatenate([one[i] for i in rest]) for one in (x, y))
            alpha = RIDGE * float(np.square(fit_x).sum(0).mean())
            fitted = Ridge(alpha=alpha).fit(fit_x, fit_y)
            judged_x, judged_y = (np.concatenate(one[4::5]) for one in (x, y))
            want = r2_score(judged_y, fitted.predict(judged_x), multioutput="variance_weighted")
            assert share == pytest.approx(want, abs=2e-4)


def test_the_teacher_itself_explains_each_of_its_layers() -> None:
    teacher = encoder("modernbert")
    table = layer_table(encoder("modernbert"), divide(TeacherSlice(batches(), passes(teacher), CPU)), CPU)
    for layer, row in enumerate(table):
        assert row[layer] == pytest.approx(1.0, abs=0.01), row
        assert max(share for share in row if share is not None) == row[layer]


def test_no_sequence_is_both_fitted_on_and_judged() -> None:
    """A corpus that is smaller than the slice comes again."""
    on = batches(2)
    once, thrice = (divide(TeacherSlice(some, passes(encoder()), CPU)) for some in (on, on * 3))
    assert torch.equal(once.fitted, thrice.fitted)
    assert torch.equal(once.judging, thrice.judging)
    assert not set(once.fitted.tolist()) & set(once.judging.tolist())
    assert len(once.fitted) + len(once.judging) == sum(sum(batch.lengths or ()) for batch in on)


def test_states_that_are_not_finite_cost_their_row_alone() -> None:
    student = narrow_student()
    with torch.no_grad():
        student.base_model.encoder.layer[1].output.dense.weight.fill_(3e38)
    table = layer_table(student, divide(TeacherSlice(batches(), passes(encoder()), CPU)), CPU)
    assert table[2] == [None] * 5
    assert None not in table[0]
    assert "n/a" in layer_text(table, (), title="x")
    assert mean_table([table, table]) == table


def test_a_corpus_that_is_too_small_has_no_tables_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_teacher", lambda *_: passes(encoder()))
    base: Any = SimpleNamespace(
        teacher_shape=SimpleNamespace(layers=4), student_shape=SimpleNamespace(width=48), seq_len=20,
        config=SimpleNamespace(data=SimpleNamespace(path="data/few"), loss=SimpleNamespace(slice_tokens=20)),
    )  # fmt: skip
    few = batches(1)[0]
    lengths = few.lengths[:2]
    one = replace(
        few, input_ids=few.input_ids[:2], attention_mask=few.attention_mask[:2], lengths=lengths,
        counts=Counts.from_lengths(np.array(lengths)),
    )  # fmt: skip
    tables = LayerTables(SimpleNamespace(device=CPU, is_rank_zero=True))  # type: ignore[arg-type]
    loader = SimpleNamespace(first_batches=lambda count: [one])
    tables.begin(SimpleNamespace(base=base, genomes=(), loader=loader))  # type: ignore[arg-type]
    said: list[str] = []
    tables.introduce(said.append)
    assert [text.strip() for text in said] == [
        "no layer tables: data/few has 20 tokens to fit a map on, and a student of width 48 needs more than 48"
    ]
    assert tables.measure(SimpleNamespace()) == []  # type: ignore[arg-type]


def test_the_text_fits_a_terminal_and_marks_what_was_trained() -> None:
    table = [[-0.126 if m == n == 4 else -12.6 if m == 0 else 0.834 for n in range(13)] for m in range(5)]
    table[1][1] = 0.999
    text = layer_text(table, {(1, 3), (4, 12)}, title="3-0-0-12")
    lines = text.splitlines()
    assert len(lines) == 1 + 1 + 5
    assert max(map(len, lines)) <= 100
    assert lines[1].split() == ["student\\teacher", "emb", *map(str, range(1, 13))]
    assert lines[3].split() == ["1", ".83", "1.00", ".83", ".83*", *[".83"] * 9]
    assert lines[6].split()[5] == "-.13"
    assert lines[2].split()[:2] == ["emb", "-13"]
    assert lines[6].endswith(".83*")
    assert text.count("*") == 2
