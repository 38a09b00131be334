"""launch/measure.py on tiny encoders: which are measured, what of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import refuse, succeed
from tiny_encoders import VOCAB, save_tiny, tiny_model

from engine.config.distill import DataConfig, RunConfig, TeacherConfig
from engine.config.tools import MeasureConfig
from engine.errors import UserError
from engine.jobs.measure.job import measure
from engine.records.comparison import Comparison
from engine.records.run_dir import RunDir, as_yaml

QUICK = {"rounds": 1, "batch_sizes": [1, 3]}


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return save_tiny("bert", tmp_path / "bert", mlm=True)


@pytest.fixture
def run_dir(tmp_path: Path, bert: str) -> RunDir:
    """A distillation of the model `bert` into an ELECTRA, whose corpus is not there."""
    run_dir = RunDir(tmp_path / "run")
    save_tiny("electra", run_dir.student)
    config = RunConfig(teacher=TeacherConfig(path=bert), data=DataConfig(path=str(tmp_path / "gone")))
    run_dir.config.write_text(as_yaml(config))
    return run_dir


def names(compared: Comparison) -> list[str]:
    return [encoder.name for encoder in compared.encoders]


def write_graph(folder: str, name: str) -> Path:
    """Writes an ONNX file of one input, which it returns."""
    onnx = pytest.importorskip("onnx", reason="pip install onnx")
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    ends = [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.INT64, ["b", "l"]) for x in (name, "out")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", [name], ["out"])], "graph", ends[:1], ends[1:])
    path = Path(folder) / "onnx" / "model.onnx"
    path.parent.mkdir()
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_an_onnx_file_stands_behind_its_model(bert: str) -> None:
    path = write_graph(bert, "input_ids")
    model, file = measure(MeasureConfig(models=[bert], **QUICK)).encoders
    assert file.name == f"{model.name} (ONNX)"
    assert (file.disk_mib, file.memory_mib) == (path.stat().st_size / 2**20, None)
    assert file.ms[0] < model.ms[0], "it computes nothing"
    assert len(measure(MeasureConfig(models=[bert], dtype="bfloat16", **QUICK)).encoders) == 1


@pytest.mark.parametrize("content", [b"", None], ids=["no graph", "another graph"])
def test_an_onnx_file_that_is_no_encoder_is_refused(content: bytes | None, bert: str) -> None:
    path = write_graph(bert, "pixels")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx.*export it again"):
        measure(MeasureConfig(models=[bert], **QUICK))


@pytest.mark.parametrize(
    ("family", "rows", "width"),
    [
        ("bert", VOCAB + 40 + 2, 48),
        ("albert", VOCAB + 40 + 2, 16),
        ("distilbert", VOCAB + 40, 48),
        ("modernbert", VOCAB, 48),
    ],
)
def test_sizes_are_those_of_the_encoder_alone(family: str, rows: int, width: int, tmp_path: Path) -> None:
    """rows: of all tables of embeddings together."""
    path = save_tiny(family, tmp_path / family, mlm=True)
    [found] = measure(MeasureConfig(models=[path], **QUICK)).encoders
    model = tiny_model(family)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters_beside_embeddings == found.parameters - rows * width
    assert found.disk_mib == (tmp_path / family / "model.safetensors").stat().st_size / 2**20
    tensors = [*model.parameters(), *model.buffers()]
    assert found.memory_mib == sum(t.numel() * t.element_size() for t in tensors) / 2**20


def test_others_are_compared_with_the_first_in_one_precision(bert: str, tmp_path: Path) -> None:
    models = [bert, save_tiny("roberta", tmp_path / "roberta"), save_tiny("albert", tmp_path / "albert")]
    compared = measure(MeasureConfig(models=models, dtype="bfloat16", **QUICK))
    assert names(compared) == models
    assert [encoder.speedup[0] == (1.0, 1.0, 1.0) for encoder in compared.encoders] == [True, False, False]
    assert all(len(encoder.ms) == 2 and min(encoder.ms) > 0 for encoder in compared.encoders)
    assert compared.encoders[0].memory_mib < 0.6 * compared.encoders[0].disk_mib
    assert (compared.seq_len, compared.dtype, compared.rounds) == (38, "bfloat16", [1, 1]), "as roberta takes"


def test_a_run_directory_or_its_student_knows_its_teacher(run_dir: RunDir, bert: str) -> None:
    for path in (run_dir.root, run_dir.student):
        assert names(measure(MeasureConfig(models=[str(path)], **QUICK))) == [bert, str(path)]
    assert names(measure(MeasureConfig(models=[str(run_dir.root), bert], **QUICK))) == [str(run_dir.root), bert]


def test_a_run_has_the_length_of_its_corpus(tiny_world, run_dir: RunDir) -> None:
    config = RunConfig(
        teacher=TeacherConfig(path=str(tiny_world.teacher)), data=DataConfig(path=str(tiny_world.corpus))
    )
    run_dir.config.write_text(as_yaml(config))
    assert measure(MeasureConfig(models=[str(run_dir.root)], **QUICK)).seq_len == 16
    assert measure(MeasureConfig(models=[str(run_dir.root)], seq_len=9, **QUICK)).seq_len == 9


def test_the_script_prints_a_table_and_a_line(run_dir: RunDir, bert: str) -> None:
    output = succeed("measure", "--models", run_dir.root, "--rounds", "1", "--batch_sizes", "2")
    lines = output.splitlines()
    assert lines[0].split() == [bert, str(run_dir.root)]
    labels = ["parameters", "without embeddings", "MiB on disk", "MiB in memory"]
    labels += ["batch 2: ms", "batch 2: sequences/s", "batch 2: times as fast"]
    assert [line.partition("  ")[0] for line in lines[1:-2]] == labels
    threads = f"{torch.get_num_threads()} thread"
    assert lines[-1].startswith("float32 forward passes over 2 x 40 tokens in turns, medians of 1 round; ")
    assert f", {threads}" in lines[-1]
    assert f"torch {torch.__version__}" in lines[-1]


def test_a_batch_that_no_memory_holds_is_one_line(bert: str) -> None:
    with pytest.raises(
        UserError, match=r"^out of memory at 1 x 8 and 10\d* x 8 tokens \(.*; write smaller batch_sizes"
    ):
        measure(MeasureConfig(models=[bert], batch_sizes=[1, 10**13], seq_len=8, rounds=1))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--models", "BERT", "nowhere"], "models='nowhere': no such folder"),
        (["--models", "BERT", "BERT"], "models='BERT': occurs twice; name each model once"),
        (["--models", "BERT", "--seq_len", "41"], "seq_len=41: BERT takes at most 40 tokens; set a smaller seq_len"),
        (["--models", "BERT", "--batch_sizes", "4,0"], "batch_sizes=[4, 0]: must be whole numbers of at least 1"),
        (["--models", "BERT", "--rounds", "0"], "rounds=0: must be at least 1"),
        (["--models", "EMPTY"], "models='EMPTY': the folder has no config.json"),
        (["--models", "UNFINISHED"], "models='UNFINISHED' is a run directory without a model yet"),
        (["--models", "ORPHAN"], "teacher.path of ORPHAN='FOLDER/gone': no such folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, run_dir: RunDir, bert: str, tmp_path: Path) -> None:
    for name in ("empty", "unfinished/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    run_dir.config.write_text(as_yaml(RunConfig(teacher=TeacherConfig(path=str(tmp_path / "gone")))))
    places = {"BERT": bert, "ORPHAN": str(run_dir.root), "FOLDER": str(tmp_path)}
    places |= {name: str(tmp_path / name.lower()) for name in ("EMPTY", "UNFINISHED")}
    for name, path in places.items():
        words, says = [word.replace(name, path) for word in words], says.replace(name, path)
    assert says in refuse("measure", *words)
