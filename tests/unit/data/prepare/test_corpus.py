from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from fork_server import hear_signals
from launching import ROOT
from tiny_tokenizers import FAMILIES, bert, make_text, roberta, saved
from transformers import AutoTokenizer

from engine.config.tools import PrepareConfig, SourceConfig
from engine.data import shards
from engine.data.manifest import MANIFEST, check_tokenizer, load_manifest, tokenizer_sha256
from engine.data.prepare import progress
from engine.data.prepare.corpus import prepare
from engine.data.prepare.sources import SourceReader
from engine.data.prepare.units import cut_units
from engine.data.shards import finished_shard, write_shard
from engine.errors import EXIT_PREEMPTED, UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """About 2.5 MB: three units of one MB."""
    path = tmp_path_factory.mktemp("text") / "news.txt"
    path.write_text(make_text(documents=3400, seed=1, paragraphs=6))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return saved("bert", tmp_path_factory.mktemp("tokenizer"))


def config(out: Path, tokenizer: str, *paths: Path, **options) -> PrepareConfig:
    sources = options.pop("sources", None) or [SourceConfig(path=str(path)) for path in paths]
    defaults = {"seq_len": 64, "shard_mb": 1, "workers": 1}
    return PrepareConfig(sources=sources, output_dir=str(out), tokenizer=tokenizer, **{**defaults, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("shard-*")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, text, tokenizer) -> Path:
    """An uninterrupted run with one worker."""
    folder = tmp_path_factory.mktemp("reference") / "corpus"
    prepare(config(folder, tokenizer, text, short_seq_prob=0.1))
    return folder


def test_shards_load_with_datasets_and_agree_with_the_manifest(reference, tokenizer, text):
    manifest = load_manifest(reference)
    assert len(manifest.shards) == 3
    tokens = 0
    tok = bert()
    for entry in manifest.shards:
        data = Dataset.from_file(str(reference / entry.file))
        assert data.column_names == ["input_ids"]
        assert data.data.schema.field("input_ids").type == pa.list_(pa.uint16())
        assert len(data) == entry.sequences
        for row in data["input_ids"]:
            assert row[0] == tok.cls_token_id
            assert row[-1] == tok.sep_token_id
            assert len(row) <= 64
            tokens += len(row)
    assert tokens == manifest.tokens == sum(entry.tokens for entry in manifest.shards)
    assert manifest.documents == 3400
    assert manifest.fill == tokens / (manifest.sequences * 64)
    totals = json.loads((reference / MANIFEST).read_text())["totals"]
    assert totals["sequences"] == manifest.sequences == sum(entry.sequences for entry in manifest.shards)


def test_the_number_of_workers_changes_nothing(reference, tmp_path, tokenizer, text):
    prepare(config(tmp_path / "two", tokenizer, text, short_seq_prob=0.1, workers=2))
    assert contents(tmp_path / "two") == contents(reference)


def test_started_again_with_everything_done_it_reads_nothing(reference, tokenizer, text, capsys):
    before = identities(reference)
    manifest = prepare(config(reference, tokenizer, text, short_seq_prob=0.1))
    assert "already prepared" in capsys.readouterr().out
    assert identities(reference) == before
    assert manifest == load_manifest(reference)


COMMAND = """
import sys
from engine.cli import prepare_main
if __name__ == "__main__":
    text, out, tokenizer, workers = sys.argv[1:]
    sys.exit(prepare_main(["--sources", text, "--output_dir", out, "--tokenizer", tokenizer, "--workers", workers,
                           "--seq_len", "64", "--shard_mb", "1", "--short_seq_prob", "0.1"]))
"""


def session_members(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def interrupt(text: Path, out: Path, tokenizer: str, kind: int, *, worker: bool = False) -> tuple[int, str]:
    """Starts prepare() in a session of its own, sends `kind` to its main process alone (or to its busy worker alone)
    after the first finished shard, and returns the exit code and stderr once nothing of the session is left."""
    script = out.with_suffix(".py")
    script.write_text(COMMAND)
    argv = [sys.executable, str(script), str(text), str(out), tokenizer, "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = out.with_suffix(".log")
    with log.open("wb") as stderr:
        job = subprocess.Popen(
            argv,
            env=env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=hear_signals,
        )
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("shard-*.json")):
            assert job.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        # the resource tracker of multiprocessing is the other child
        target = [p for p in session_members(job.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(target) == 1
        os.kill(target[0] if worker else job.pid, kind)
        code = job.wait(30)
        while session_members(job.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert session_members(job.pid) == []
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert not (out / MANIFEST).exists()
    with pytest.raises(UserError, match="not finished"):
        load_manifest(out)
    return code, log.read_text()


@pytest.mark.faults
def test_killed_half_way_it_redoes_only_what_is_missing(reference, tmp_path, tokenizer, text):
    out = tmp_path / "corpus"
    code, _ = interrupt(text, out, tokenizer, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = {p.with_suffix(".arrow").name for p in out.glob("shard-*.json")}
    assert 0 < len(done) < 3
    before = identities(out)
    (out / "shard-00002.arrow.tmp-1").write_bytes(b"half a shard")
    prepare(config(out, tokenizer, text, short_seq_prob=0.1))
    after = identities(out)
    assert contents(out) == contents(reference)
    assert {name: after[name] for name in done} == {name: before[name] for name in done}


@pytest.mark.faults
def test_sigterm_and_ctrl_c_leave_no_orphan_and_no_manifest(tmp_path, tokenizer, text):
    for name, number in (("a", signal.SIGTERM), ("b", signal.SIGINT)):
        code, said = interrupt(text, tmp_path / name, tokenizer, number)
        assert code == EXIT_PREEMPTED
        assert "the same command continues" in said


@pytest.mark.faults
def test_a_worker_that_dies_is_reported(tmp_path, tokenizer, text):
    code, log = interrupt(text, tmp_path / "a", tokenizer, signal.SIGKILL, worker=True)
    assert code != 0
    assert "error: a worker process died" in log


def test_an_old_sidecar_never_vouches_for_a_new_shard(tmp_path, monkeypatch):
    """Killed between the two files of a shard: the shard is new, so the sidecar of the old one must be gone."""
    row = [np.arange(4, dtype=np.int32)]
    write_shard(tmp_path, 0, "old", row, dtype=pa.uint16(), dropped=0)
    assert finished_shard(tmp_path, 0, "old") is not None
    assert finished_shard(tmp_path, 0, "new") is None
    write = shards.write_whole

    def stop_at_the_sidecar(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(shards, "write_whole", stop_at_the_sidecar)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, "new", [row[0] + 1], dtype=pa.uint16(), dropped=0)  # as many bytes as before
    assert finished_shard(tmp_path, 0, "old") is None


@pytest.mark.faults
def test_a_lost_or_torn_shard_is_made_again_and_the_others_kept(reference, tmp_path, tokenizer, text):
    want = contents(reference)
    before = identities(reference)
    (reference / "shard-00001.arrow").write_bytes(b"torn")
    prepare(config(reference, tokenizer, text, short_seq_prob=0.1))
    assert contents(reference) == want
    after = identities(reference)
    assert {name for name in after if after[name] != before[name]} == {"shard-00001.arrow", "shard-00001.json"}


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.txt"
    path.write_text(make_text(documents=30, seed=2))
    return path


def test_other_settings_or_text_make_the_corpus_again(tmp_path, tokenizer, small):
    out = tmp_path / "out"
    first = prepare(config(out, tokenizer, small))
    second = prepare(config(out, tokenizer, small, seq_len=32))
    assert second.seq_len == 32
    assert second.shards[0].sha256 != first.shards[0].sha256
    small.write_text(make_text(documents=31, seed=2))
    third = prepare(config(out, tokenizer, small, seq_len=32))
    assert third.documents == 31
    assert third.sources[0].sha256 != second.sources[0].sha256
    weighted = prepare(config(out, tokenizer, sources=[SourceConfig(path=str(small), weight=2.0)], seq_len=32))
    assert weighted.sources[0].weight == 2.0
    assert weighted.shards == third.shards


def test_shards_of_an_earlier_larger_corpus_are_removed(tmp_path, tokenizer, small):
    out = tmp_path / "out"
    prepare(config(out, tokenizer, small, small))
    assert (out / "shard-00001.arrow").exists()
    prepare(config(out, tokenizer, small))
    assert sorted(contents(out)) == ["manifest.json", "shard-00000.arrow", "shard-00000.json"]


@pytest.mark.parametrize(
    ("family", "pack", "unit"),
    [  # every two values of different kinds meet
        (family, pack, ("sentence", "paragraph" if pack == "unit" else "token")[(i + j) % 2])
        for i, family in enumerate(FAMILIES)
        for j, pack in enumerate(["document", "contiguous", "unit"])
    ],
)
def test_text_survives_for_every_tokenizer(tmp_path, small, family, pack, unit):
    """What decoding the shards gives back is the text: nothing lost, repeated or moved."""
    folder = saved(family, tmp_path)
    longest = 512 if pack == "unit" else 64  # units are cut
    options = {"seq_len": longest, "pack": pack, "unit": unit, "min_tokens": 1}
    manifest = prepare(config(tmp_path / "out", folder, small, **options))
    tok = AutoTokenizer.from_pretrained(folder)
    rows = Dataset.from_file(str(tmp_path / "out" / manifest.shards[0].file))["input_ids"]
    for row in rows:
        assert (row[0], row[-1]) == (tok.cls_token_id, tok.sep_token_id)
    inner = [i for row in rows for i in row[1:-1] if i != tok.sep_token_id]
    assert "".join(tok.decode(inner).lower().split()) == "".join(small.read_text().lower().split())
    separators = sum(row[1:-1].count(tok.sep_token_id) for row in rows)
    assert separators > 10 if pack == "contiguous" else separators == 0
    if (pack, unit) == ("contiguous", "token"):
        assert all(len(row) == 64 for row in rows[:-1])


@pytest.mark.parametrize(("unit", "count"), [("sentence", 5), ("paragraph", 3)])
def test_each_unit_is_a_sequence_of_its_own(tmp_path, tokenizer, unit, count):
    text = tmp_path / "text.txt"
    text.write_text("A first one. A second one.\nA third one.\n\nOne more of it. And the last one.\n")
    manifest = prepare(config(tmp_path / "out", tokenizer, text, pack="unit", unit=unit))
    assert manifest.min_tokens == 1
    rows = Dataset.from_file(str(tmp_path / "out" / manifest.shards[0].file))["input_ids"]
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    lines = text.read_text().replace("\n\n", "\n").splitlines()
    want = lines if unit == "paragraph" else [f"{part}." for line in lines for part in line.rstrip(".").split(". ")]
    assert len(rows) == count
    assert ["".join(decode(row[1:-1]).lower().split()) for row in rows] == ["".join(s.lower().split()) for s in want]


LONG = f"{'and ' * 40}then."


@pytest.mark.parametrize(
    ("unit", "texts"),
    [("sentence", [LONG, "A second one.", "Third", "?"]), ("paragraph", [f"{LONG} A second one.", "Third", "?"])],
)
def test_a_unit_longer_than_a_sequence_is_cut_and_counted(tmp_path, tokenizer, unit, texts, capsys):
    """Sequences are what the tokenizer makes of each text alone, the shortest too, and the rest makes no second one."""
    text = tmp_path / "text.txt"
    text.write_text(f"{LONG} A second one.\nThird\n\n?\n")
    manifest = prepare(config(tmp_path / "out", tokenizer, text, pack="unit", unit=unit, seq_len=16))
    rows = Dataset.from_file(str(tmp_path / "out" / manifest.shards[0].file))["input_ids"]
    tok = AutoTokenizer.from_pretrained(tokenizer)
    want = [tok(text, truncation=True, max_length=16)["input_ids"] for text in texts]
    assert rows[:] == want
    assert manifest.sources[0].cut == 1
    assert f"cut 1 {unit} at the end of a sequence of seq_len=16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"unit": "token"}, {"short_seq_prob": 0.1}])
def test_what_has_no_effect_on_units_is_refused(other):
    with pytest.raises(UserError, match="pack=unit"):
        PrepareConfig(pack="unit", **other)


def test_several_sources_keep_apart(tmp_path, tokenizer, small):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"body": d}) + "\n" for d in make_text(documents=9, seed=3).split("\n\n")))
    sources = [SourceConfig(path=str(small)), SourceConfig(path=str(other), field="body", weight=0.5)]
    manifest = prepare(config(tmp_path / "out", tokenizer, sources=sources))
    assert [(s.weight, s.documents) for s in manifest.sources] == [(1.0, 30), (0.5, 9)]
    assert [shard.source for shard in manifest.shards] == [0, 1]


@pytest.mark.faults
def test_bad_lines_stop_it_or_are_counted(tmp_path, tokenizer, small, capsys):
    small.write_bytes(b"bad \xff line\n" + small.read_bytes())
    with pytest.raises(UserError, match=r"small\.txt:1: is not UTF-8"):
        prepare(config(tmp_path / "out", tokenizer, small))
    assert not (tmp_path / "out" / MANIFEST).exists()
    manifest = prepare(config(tmp_path / "out", tokenizer, small, on_bad_line="skip"))
    assert manifest.sources[0].bad_lines == 1
    out = capsys.readouterr().out
    assert "skipped 1 bad line:" in out
    assert "small.txt:1" in out


def test_a_source_that_is_refused_leaves_an_earlier_corpus_as_it_is(tmp_path, reference, tokenizer, small):
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    before = contents(out)
    bad = tmp_path / "bad.txt"
    for data in (b"bad \xff line\n", b"%PDF-1.7"):
        bad.write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.txt"):
            prepare(config(out, tokenizer, small, bad))
        assert contents(out) == before
        with pytest.raises(UserError, match=r"bad\.txt"):
            prepare(config(tmp_path / "new", tokenizer, bad))
        assert not (tmp_path / "new").exists()


def test_progress_is_whole_lines_where_there_is_no_terminal(tmp_path, tokenizer, small, capsys, monkeypatch):
    prepare(config(tmp_path / "quiet", tokenizer, small))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    prepare(config(tmp_path / "out", tokenizer, small, small))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"prepare: 0\.0 MB of text in 00:\d\d, .* MB/s; 100% of about 0\.0 MB, 00:00 left", lines[-1])


def test_the_first_bad_lines_of_many_are_shown(tmp_path, tokenizer, small, capsys):
    small.write_bytes(b"bad \xff line\n" * 1200 + small.read_bytes())
    prepare(config(tmp_path / "out", tokenizer, small, on_bad_line="skip"))
    out = capsys.readouterr().out
    assert "does not know" not in out
    assert "small.txt: skipped 1,200 bad lines, the first of them:" in out
    assert out.count("is not UTF-8") == 5


def test_errors_name_the_key(tmp_path, tokenizer, small):
    with pytest.raises(UserError, match=r"sources=\[\]"):
        prepare(config(tmp_path / "out", tokenizer))
    with pytest.raises(UserError, match="tokenizer='/no/such'"):
        prepare(config(tmp_path / "out", "/no/such", small))
    with pytest.raises(UserError, match="min_tokens=63"):
        prepare(config(tmp_path / "out", tokenizer, small, min_tokens=63))
    short = tmp_path / "short.txt"
    short.write_text("The school.")
    with pytest.raises(UserError, match=r"short\.txt: gave no sequence of at least min_tokens=8"):
        prepare(config(tmp_path / "out", tokenizer, short))
    assert not (tmp_path / "out").exists()


def test_a_failure_before_the_first_shard_leaves_no_folder(tmp_path, tokenizer, small):
    small.write_bytes(small.read_bytes() + b"bad \xff line\n")
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new" / "deep", tmp_path / "there"):
        with pytest.raises(UserError, match=r"is not UTF-8"):
            prepare(config(out, tokenizer, small))
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "there").iterdir()) == []


def test_the_share_of_unknown_tokens_is_reported(tmp_path, tokenizer, small, capsys):
    small.write_text("\n".join(["the school \u2603"] * 40))
    manifest = prepare(config(tmp_path / "unknown", tokenizer, small))
    share = 40 / manifest.tokens
    assert f"{share:.2%} of the new tokens are unknown tokens" in capsys.readouterr().out


@pytest.mark.faults
def test_two_writers_in_one_folder(tmp_path, tokenizer, small):
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another prepare_data"):
            prepare(config(out, tokenizer, small))


def test_without_file_locks_it_goes_on_with_a_word(tmp_path, tokenizer, small, no_flock, capsys):
    out = tmp_path / "out"
    assert prepare(config(out, tokenizer, small)).sequences > 0
    assert f"{out}: no file locks there, so a second prepare_data.py would not be noticed" in capsys.readouterr().out


def test_units_are_bounded_and_keep_documents_whole_where_they_can(tmp_path):
    path = tmp_path / "a.txt"
    documents = [["x" * 40] * 2, ["y" * 40] * 20, ["z" * 40], ["w" * 99]]
    path.write_text("\n\n".join("\n".join(d) for d in documents))
    reader = SourceReader(SourceConfig(path=str(path)), max_line_bytes=100)
    units = list(cut_units(reader, unit_bytes=100, first_index=5))
    assert [unit.index for unit in units] == list(range(5, 5 + len(units)))
    assert max(len(unit.text) for unit in units) <= 300
    assert b"\n".join(unit.text for unit in units).replace(b"\n\n", b"\n") == path.read_bytes().replace(b"\n\n", b"\n")
    assert all(len(unit.text) >= 100 for unit in units[:-1])


@pytest.mark.faults
def test_manifest_errors(tmp_path, reference):
    with pytest.raises(UserError, match=r"no such folder; prepare a corpus with python launch/prepare_data\.py"):
        load_manifest(tmp_path / "none")
    with pytest.raises(UserError, match=r"not a prepared corpus.*python launch/prepare_data\.py"):
        load_manifest(tmp_path)
    good = json.loads((reference / MANIFEST).read_text())
    for text, what in [
        ("{", "unreadable"),
        ("[]", "unreadable"),
        (json.dumps({k: v for k, v in good.items() if k != "seq_len"}), "unreadable"),
        (json.dumps({**good, "version": 99}), "format 99"),
        (json.dumps({**good, "shards": [{**good["shards"][0], "source": 7}]}), "unreadable"),
    ]:
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=what):
            load_manifest(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["sequences", "tokens"])
@pytest.mark.parametrize("where", ["sources", "shards"])
def test_a_wrong_digit_in_the_manifest_is_named(tmp_path, reference, name, where):
    values = json.loads((reference / MANIFEST).read_text())
    (source,), right = values["sources"], values["totals"][name]
    values[where][0][name] += 100
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    told, added = (right + 100, right) if where == "sources" else (right, right + 100)
    with pytest.raises(UserError) as error:
        load_manifest(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / MANIFEST}: sources[0] ({source['path']}) has {name}={told}, but its shards have {added} "
        "together; copy it again, or run python launch/prepare_data.py again"
    )


@pytest.mark.faults
def test_the_tokenizer_must_match_and_its_hash_is_stable(tmp_path, reference, tokenizer):
    manifest = load_manifest(reference)
    tok = AutoTokenizer.from_pretrained(tokenizer)
    tok(["a b c"], padding=True, truncation=True, max_length=8)  # changes padding and truncation of the backend
    check_tokenizer(manifest, tok)
    tok.save_pretrained(str(tmp_path / "copy"))
    check_tokenizer(manifest, AutoTokenizer.from_pretrained(str(tmp_path / "copy")))
    other = AutoTokenizer.from_pretrained(saved("roberta", tmp_path))
    with pytest.raises(UserError, match=r"tokenizer-bert.*tokenizer-roberta"):
        check_tokenizer(manifest, other)
    assert tokenizer_sha256(other) == tokenizer_sha256(roberta())
    with pytest.raises(UserError):
        check_tokenizer(dataclasses.replace(manifest, tokenizer_sha256="0" * 64), tok)
