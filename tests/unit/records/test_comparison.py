"""Encoders beside the first: table, sentence, and the record."""

from __future__ import annotations

import json
from dataclasses import asdict

from engine.records.comparison import Comparison, MeasuredEncoder

TEACHER = MeasuredEncoder(
    name="teacher",
    parameters=2000,
    parameters_beside_embeddings=1000,
    disk_mib=80.0,
    memory_mib=79.96,
    ms=[10.0, 200.0],
    speedup=[(1.0, 1.0, 1.0), (1.0, 1.0, 1.0)],
)
STUDENT = MeasuredEncoder(
    name="student",
    parameters=700,
    parameters_beside_embeddings=250,
    disk_mib=28.0,
    memory_mib=27.9,
    ms=[5.0, 40.0],
    speedup=[(2.04, 1.9, 2.1), (5.0, 4.75, 5.5)],
)
BOTH = Comparison(
    encoders=[TEACHER, STUDENT],
    batch_sizes=[1, 32],
    seq_len=128,
    dtype="float32",
    rounds=[10, 4],
    machine="a processor, 2 threads; torch 2",
)


def test_the_table_has_shares_and_speeds() -> None:
    assert BOTH.rows() == [
        ["", "teacher", "student"],
        ["parameters", "2,000", "700 (35%)"],
        ["without embeddings", "1,000", "250 (25%)"],
        ["MiB on disk", "80.0", "28.0 (35%)"],
        ["MiB in memory", "80.0", "27.9 (35%)"],
        ["batch 1: ms", "10.00", "5.00"],
        ["batch 1: sequences/s", "100.0", "200.0"],
        ["batch 1: times as fast", "1", "2.04 (1.90 to 2.10)"],
        ["batch 32: ms", "200.00", "40.00"],
        ["batch 32: sequences/s", "160.0", "800.0"],
        ["batch 32: times as fast", "1", "5.00 (4.75 to 5.50)"],
    ]


def test_the_sentence_and_the_conditions() -> None:
    assert BOTH.summary == "35% of the parameters, 2.0 times as fast at batch 1, 5.0 times as fast at batch 32"
    assert BOTH.conditions == (
        "float32 forward passes over 1 and 32 x 128 tokens in turns, medians of 10 rounds and 4 rounds; a processor, "
        "2 threads; torch 2"
    )


def test_a_record_gives_it_back() -> None:
    again = Comparison.from_record(json.loads(json.dumps(asdict(BOTH))))
    assert again.rows() == BOTH.rows()
    assert (again.summary, again.conditions) == (BOTH.summary, BOTH.conditions)
