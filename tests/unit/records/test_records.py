import io
import json
import math
from pathlib import Path

import pytest

from engine.records.records import RecordWriter, final_result, format_record, parse_record, read_records

LINE = format_record("step", step=3, total=0.25)


@pytest.mark.parametrize("prefix", ["", "worker-1: ", "\x1b[32mINFO\x1b[0m ", "[rank0]:"])
@pytest.mark.parametrize("tail", ["", "\n", "@record {torn", "worker-2: half a line", "\x1b[0m"])
def test_parses_behind_any_prefix_and_with_a_glued_tail(prefix: str, tail: str) -> None:
    assert parse_record(prefix + LINE + tail) == {"v": 1, "kind": "step", "step": 3, "total": 0.25}


def test_every_torn_line_is_none_and_never_a_wrong_record() -> None:
    whole = parse_record(LINE)
    for cut in range(len(LINE)):
        assert parse_record(LINE[:cut]) is None
    assert whole is not None


def test_the_file_has_json_lines_and_files_of_old_are_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(LINE + "\n")
    writer = RecordWriter(path, stream=io.StringIO())
    writer.write("step", step=4)
    writer.close()
    assert json.loads(path.read_text().splitlines()[1]) == {"v": 1, "kind": "step", "step": 4}
    assert [record["step"] for record in read_records(path)] == [3, 4]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        '{"kind": "step"}',
        'x {"v": 1, "kind": "step"}',
        "step 3",
        '@record {"v":2,"kind":"step"}',
        '@record {"v":1,"kind":"x"}',
        "@record 7",
    ],
)
def test_what_is_not_a_record(line: str) -> None:
    assert parse_record(line) is None


def test_non_finite_numbers_become_null() -> None:
    record = parse_record(format_record("error", total=math.nan, terms={"a": [math.inf, 1.0]}))
    assert record is not None
    assert record["total"] is None
    assert record["terms"] == {"a": [None, 1.0]}


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown record kind 'steps'"):
        format_record("steps")


@pytest.mark.faults
def test_writer_appends_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(LINE + "\n" + LINE[:20])
    stream = io.StringIO()
    writer = RecordWriter(path, echo=True, stream=stream)
    writer.write("result", status="done")
    writer.close()
    assert [r["kind"] for r in read_records(path)] == ["step", "result"]
    assert parse_record(stream.getvalue()) == {"v": 1, "kind": "result", "status": "done"}


def test_only_the_last_start_proves_success() -> None:
    start = {"kind": "run", "status": "started"}
    first, second = {"kind": "result", "step": 1}, {"kind": "result", "step": 2}
    step = {"kind": "step", "step": 1}
    assert final_result([]) is None
    assert final_result([start, step]) is None
    assert final_result([start, step, first]) == first
    assert final_result([start, first, start, step]) is None
    assert final_result([start, first, start, step, second]) == second


def test_a_program_is_given_each_record_as_the_file_has_it(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    writer = RecordWriter(tmp_path / "records.jsonl", stream=io.StringIO(), on_record=heard.append)
    writer.write("step", step=1, total=math.nan, terms={"hidden/1-2": (0.5,)})
    writer.write("result", status="done")
    writer.close()
    assert heard == read_records(tmp_path / "records.jsonl")
    assert heard[0]["total"] is None
