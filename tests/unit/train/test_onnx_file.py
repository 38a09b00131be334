"""The ONNX file of an export: what it computes, what it must not say, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_encoders import tiny_config, tiny_model

from engine.errors import UserError
from engine.models.hub import model_class
from engine.records.history import History
from engine.train.export import write_model
from engine.train.onnx_file import ONNX_FILE, SHAPES, TOLERANCE, open_session, require_onnx, write_onnx

pytest.importorskip("onnxscript")
ENCODER = ["last_hidden_state"]
BERT_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
slow = pytest.mark.thorough
"""Each family takes half a minute."""


@pytest.mark.parametrize(
    ("family", "inputs"),
    [
        ("bert", BERT_INPUTS),
        pytest.param("roberta", BERT_INPUTS, marks=slow),
        pytest.param("mpnet", BERT_INPUTS[:2], marks=slow),
        pytest.param("deberta-v2", BERT_INPUTS[:2], marks=slow),
        pytest.param("modernbert", BERT_INPUTS[:2], marks=slow),
    ],
)
def test_the_file_computes_what_the_encoder_does(family: str, inputs: list[str], tmp_path: Path) -> None:
    model = tiny_model(family, mlm=True)
    gap = write_onnx(model, "mlm", tmp_path)
    assert 0 < gap <= TOLERANCE
    session = open_session(tmp_path / ONNX_FILE)
    assert [one.name for one in session.get_inputs()] == inputs
    assert [one.name for one in session.get_outputs()] == ENCODER
    batch, length = SHAPES[2][0] + 4, SHAPES[2][1] + 6
    ids = torch.arange(batch * length).reshape(batch, length) % 45 + 5
    mask = torch.ones_like(ids)
    mask[1:, 9:] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        want = model.base_model(**{name: feed[name] for name in inputs}).last_hidden_state
    got = torch.from_numpy(session.run(ENCODER, {name: feed[name].numpy() for name in inputs})[0])
    assert (want - got)[mask.bool()].abs().max() <= TOLERANCE
    content = (tmp_path / ONNX_FILE).read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


@slow
def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    model = model_class(tiny_config("bert"), "classification")(tiny_config("bert")).eval()
    write_onnx(model, "classification", tmp_path)
    [output] = open_session(tmp_path / ONNX_FILE).get_outputs()
    assert (output.name, output.shape[1]) == ("logits", 2)


def test_a_model_that_cannot_be_exported_leaves_the_earlier_export(tmp_path: Path) -> None:
    target, model = tmp_path / "out", tiny_model("bert")
    description = {"card": {}, "licences": [], "base_model": None, "head": "none", "step": 7}
    write_model(model, description, {}, tmp_path / "none", target, history=History())
    before = (target / "config.json").read_bytes()
    model.encoder.layer[0].register_forward_pre_hook(lambda _, given: (given[0] * float(given[0].sum()), *given[1:]))
    with pytest.raises(UserError, match=r"^format='onnx': torch.onnx cannot export BertModel \(.*leave --format out$"):
        write_model(model, description, {}, tmp_path / "none", target, history=History(), with_onnx=True)
    assert (target / "config.json").read_bytes() == before
    assert json.loads(before)["model_type"] == "bert"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")

    def shift(_module: object, _given: object, output: torch.Tensor) -> torch.Tensor:
        return output if torch.compiler.is_exporting() else output + 0.01

    model.encoder.layer[0].intermediate.register_forward_hook(shift)
    with pytest.raises(UserError, match=r"differ from PyTorch's by \d\.\de-0[23], more than 1e-04; leave --format"):
        write_onnx(model, "none", tmp_path)


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(UserError, match=r"model.onnx: onnxruntime cannot read it \(.*export it again$"):
        open_session(tmp_path / "model.onnx")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(__import__("sys").modules, "onnxscript", raising=False)
    with pytest.raises(UserError, match=r"missing Python packages: .*onnxscript.*; pip install "):
        require_onnx()
