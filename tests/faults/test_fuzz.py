"""Files and texts that a user may give, changed at random: each is read, or refused in one line; nothing else."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_world import save_tiny_teacher

from engine.config.deepspeed import resolve_execution
from engine.config.distill import OptimConfig, RunConfig, TrainConfig
from engine.config.finetune import FinetuneConfig
from engine.config.hostfile import parse_hostfile
from engine.config.reading import parse_config
from engine.config.tools import SourceConfig
from engine.data.manifest import load_manifest
from engine.data.prepare.sources import SourceReader
from engine.errors import UserError
from engine.hub.config import load_config
from engine.hub.files import stored_tensors
from engine.hub.tokenizer import load_tokenizer
from engine.mapping import MappingPair
from engine.records.records import parse_record, read_records
from engine.tasks.load import load_task

pytestmark = [pytest.mark.faults, pytest.mark.thorough]
ROOT = Path(__file__).parents[2]
FRAGMENTS = [
    *(b"", b"\n", b"\r", b"\n\n", b"\t", b" ", b":", b": ", b"- ", b"-", b",", b";", b'"', b"'", b"{", b"}", b"["),
    *(b"#", b"&a", b"*a", b"<<: ", b"---\n", b"!!python/object", b"~", b"null", b"true", b"no", b"0", b"-1", b"1e400"),
    *(b".nan", b"9" * 5000, b"1_000", b"010", b"12:30", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\x00"),
    *("ü🦜".encode(), b"version https://git-lfs.github.com/spec/v1\n", b"<doc id=1>", b"__proto__", b"slots=", b"0-"),
]
counts: dict[str, Counter[str]] = {}


@pytest.fixture(autouse=True, scope="module")
def show_counts() -> Iterator[None]:
    yield
    for name, counter in counts.items():
        print(f"fuzz {name}: {counter['read']} read, {counter['refused']} refused")


@st.composite
def changed(draw: st.DrawFn, samples: list[bytes]) -> bytes:
    """One of the samples with up to five changes: a piece is cut out, doubled, or makes room for a fragment."""
    data = draw(st.sampled_from(samples))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        what = draw(st.sampled_from(["cut", "double", "replace", "insert"]))
        piece = draw(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=8)))
        middle = {"cut": b"", "double": data[start:end] * 2, "replace": piece, "insert": piece + data[start:end]}[what]
        data = data[:start] + middle + data[end:]
    return data


def attempt(name: str, read: Callable[[], object]) -> None:
    """Anything but a UserError of one line fails the test."""
    counter = counts.setdefault(name, Counter())
    try:
        read()
    except UserError as error:
        text = str(error)
        assert text.strip()
        assert "\n" not in text.strip(), text
        counter["refused"] += 1
    else:
        counter["read"] += 1


def examples(count: int) -> Any:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def yaml_samples(*names: str) -> list[bytes]:
    return [(ROOT / "examples" / name).read_bytes() for name in names]


@examples(400)
@given(data=changed(yaml_samples("quickstart.yaml", "tinybert.yaml", "minilmv2.yaml")))
def test_settings_of_a_run(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    attempt("settings", lambda: parse_config(RunConfig, ["--config", str(tmp_path / "c.yaml")], ""))


@examples(300)
@given(key=st.sampled_from(["train.lr", "train.steps", "mapping.hidden", "loss.kernel", "teacher"]), value=st.text())
def test_settings_on_a_command_line(key: str, value: str) -> None:
    attempt("command line", lambda: parse_config(RunConfig, [f"--{key}={value}"], ""))
    attempt("command line", lambda: parse_config(FinetuneConfig, ["--task.custom", value], ""))


@examples(300)
@given(data=changed([file.read_bytes() for file in sorted((ROOT / "ds_configs").glob("*.json"))]))
def test_deepspeed_files(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_bytes(data)
    attempt("deepspeed file", lambda: resolve_execution(TrainConfig(), OptimConfig(), file, 1))


@examples(2000)
@given(
    text=st.one_of(
        st.text(alphabet="0123456789-,;+ /:x*", max_size=24),
        st.sampled_from(["uniform", "last", "first", "none", "all-last", "4-8-12", "1-2/3-4"]),
        st.text(max_size=12),
    ),
    M=st.integers(1, 6),
    N=st.integers(1, 12),
)
def test_mapping_texts(text: str, M: int, N: int) -> None:
    attempt("mappings", lambda: MappingPair.parse(text, student_layers=M, teacher_layers=N, key="genomes"))


@examples(600)
@given(data=changed([b"worker-1 slots=8\nworker-2 slots=8\n", b"# hosts\n10.0.0.1 slots=1 # one\n\nhost slots=2\n"]))
def test_hostfiles(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(data)
    attempt("hostfiles", lambda: parse_hostfile(tmp_path / "hosts"))


TEXTS = {
    ".txt": b"The small model.\nOne teacher.\n\nEvery token \xc3\xa9.\n",
    ".jsonl": b'{"text": "the small model"}\n{"text": "one teacher", "meta": [1, null]}\n',
    ".csv": b'text,label\n"the small, model",a\none teacher,b\n',
    ".tsv": b"text\tlabel\nthe small model\ta\none teacher\tb\n",
    ".json": b'[{"text": "the small model"}, {"text": "one teacher"}]',
}


@examples(500)
@given(
    ending=st.sampled_from([*TEXTS, "", ".log", ".xml", ".parquet", ".txt.gz", ".jsonl.zst"]),
    data=changed(list(TEXTS.values())),
    packed=st.sampled_from([None, gzip.compress, zstandard.ZstdCompressor().compress]),
    skip=st.booleans(),
)
def test_sources_of_text(ending: str, data: bytes, packed: Any, skip: bool, tmp_path: Path) -> None:
    file = tmp_path / f"text{ending}"
    file.write_bytes(packed(data) if packed else data)

    def read() -> None:
        for _ in SourceReader(SourceConfig(path=str(file)), max_line_bytes=10_000, skip_bad=skip):
            pass

    attempt("text", read)


SQUAD = {
    "version": "v2.0",
    "data": [{"paragraphs": [{"context": "The small model learns.", "qas": [
        {"id": "1", "question": "Who?", "is_impossible": False, "answers": [{"text": "small", "answer_start": 4}]},
        {"id": 2, "question": "Who?", "is_impossible": True, "answers": []},
    ]}]}],
}  # fmt: skip


@examples(300)
@given(data=changed([json.dumps(SQUAD).encode()]))
def test_files_of_questions(data: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "SQuAD-v2"
    folder.mkdir(exist_ok=True)
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        (folder / name).write_bytes(data)
    words = ["--task.name", "SQuAD-v2", "--task.data_dir", str(tmp_path)]
    attempt("questions", lambda: load_task("SQuAD-v2", parse_config(FinetuneConfig, words, "").task))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny_teacher(folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_files_of_a_model(name: str, teacher: Path, tmp_path: Path) -> None:
    original = (teacher / name).read_bytes()
    folder = Path(shutil.copytree(teacher, tmp_path / "model"))

    def read() -> None:
        load_config(str(folder), "teacher.path")
        load_tokenizer(str(folder), "teacher.path")
        stored_tensors(str(folder), "teacher.path")

    @examples(120)
    @given(data=changed([original]))
    def fuzz(data: bytes) -> None:
        (folder / name).write_bytes(data)
        attempt(name, read)

    fuzz()


@examples(500)
@given(data=changed([b'noise\n@record {"kind": "step", "step": 4, "v": 1}\n@record {"kind": "result", "v": 1}\n']))
def test_records(data: bytes, tmp_path: Path) -> None:
    """Never an error: a job may have died anywhere."""
    (tmp_path / "records.jsonl").write_bytes(data)
    for record in read_records(tmp_path / "records.jsonl"):
        assert "kind" in record
    parse_record(data.decode("utf-8", "replace"))


MANIFEST = {
    **dict.fromkeys(["tokenizer", "tokenizer_sha256", "pack", "unit", "on_bad_line"], "x"),
    **dict.fromkeys(["vocab_size", "seq_len", "short_seq_prob", "min_tokens", "shard_mb", "seed", "version"], 1),
    "sources": [],
    "shards": [],
    "totals": {},
}


@examples(200)
@given(data=changed([json.dumps(MANIFEST).encode()]))
def test_manifests(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    attempt("manifest", lambda: load_manifest(tmp_path))
