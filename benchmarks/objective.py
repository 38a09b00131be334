"""Which projection and which scale of the losses: short proxies of a few mappings under each, scored on tasks.

    taskset -c 0 python benchmarks/objective.py --out objective.0.csv --shard 0/2
    taskset -c 1 python benchmarks/objective.py --out objective.1.csv --shard 1/2
    python benchmarks/objective.py --report objective.0.csv objective.1.csv

The student is three of MiniLM's six layers, copied from layers 2, 4 and 6. One job for each combination, learning rate,
length and seed holds four mappings and `none`, which learns from the embeddings alone. Intervals are of 95 % over
(mapping, seed) pairs, as if these were independent; differences are between equal mappings and seeds.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from campaign import TASKS, Cell, Row, arguments, as_difference, read_scored, run
from measuring import header

PROJECTIONS = {
    "random": ("--loss.projection", "shared", "--loss.projection_init", "random"),
    "fitted": ("--loss.projection", "shared", "--loss.projection_init", "fitted"),
    "identity": ("--loss.projection", "identity"),
}
NONE = "0-0-0"
GENOMES = ("2-4-6", "4-5-6", "1-2-3", "1-0-6", NONE)
MEASURED = {*TASKS, "core_seconds", "code"}
COMBINATION = ("steps", "lr", "scale", "projection")
DIFFERENCES = (("projection", "identity", "fitted"), ("projection", "fitted", "random"), ("scale", "teacher", "none"))


def cells(args: Namespace) -> list[Cell]:
    """The short ones first; the two seeds of a combination are neighbours, and so in different shards."""
    found = itertools.product(args.steps, args.lr, args.scale, args.projection, args.seeds)
    return [
        Cell(
            columns={"steps": steps, "lr": lr, "scale": scale, "projection": projection, "seed": seed},
            settings=("--proxy.steps", steps, "--train.lr", lr, "--loss.scale", scale, "--seed", seed)
            + ("--student.hidden_size", "null")
            + PROJECTIONS[projection],
            genomes=GENOMES,
        )
        for steps, lr, scale, projection, seed in found
    ]


def score(row: Row, task: str | None) -> float:
    """task: None for the mean of all."""
    return fmean(float(row[name]) for name in TASKS) if task is None else float(row[task])


def report(rows: Sequence[Row]) -> None:
    print("Scores of the mappings, those of `none` in brackets; gain: mean over tasks of what mappings are above it\n")
    print(header(*COMBINATION, *TASKS, "gain", "pairs"))
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in COMBINATION)].append(row)
    for key in sorted(groups, key=by_size):
        nones = {row["seed"]: row for row in groups[key] if row["genome"] == NONE}
        trained = [row for row in groups[key] if row["genome"] != NONE and row["seed"] in nones]
        if not trained:
            continue
        shown = []
        for task in TASKS:
            of_mappings, of_none = ([score(row, task) for row in some] for some in (trained, nones.values()))
            shown.append(f"{fmean(of_mappings):.4f} ({fmean(of_none):.4f})")
        gains = [score(row, None) - score(nones[row["seed"]], None) for row in trained]
        print(f"| {' | '.join((*key, *shown, as_difference(gains), str(len(gains))))} |")
    print("\nDifferences at equal mappings and seeds\n")
    print(header("difference", "steps", "lr", *TASKS, "mean", "pairs"))
    for column, one, other in DIFFERENCES:
        of_settings: dict[tuple[str, str], list[tuple[Row, Row]]] = defaultdict(list)
        pairs = paired(rows, column, one, other)
        for pair in pairs:
            of_settings[pair[0]["steps"], pair[0]["lr"]].append(pair)
        shown = [(key, of_settings[key]) for key in sorted(of_settings, key=by_size)]
        for key, some in [*shown, (("all", "all"), pairs)] if len(shown) > 1 else shown:
            by_task = [as_difference([score(a, task) - score(b, task) for a, b in some]) for task in (*TASKS, None)]
            print(f"| {' | '.join((f'{one} - {other}', *key, *by_task, str(len(some))))} |")


def by_size(key: Sequence[str]) -> tuple[int, float, Sequence[str]]:
    return int(key[0]), float(key[1]), key[2:]


def paired(rows: Sequence[Row], column: str, one: str, other: str) -> list[tuple[Row, Row]]:
    """Rows of mappings that differ in `column` alone."""

    def rest(row: Row) -> tuple[str, ...]:
        return tuple(value for name, value in row.items() if name != column and name not in MEASURED)

    others = {rest(row): row for row in rows if row[column] == other}
    return [
        (row, others[rest(row)]) for row in rows if row[column] == one and row["genome"] != NONE and rest(row) in others
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--projection", nargs="+", default=list(PROJECTIONS), choices=list(PROJECTIONS))
    parser.add_argument("--scale", nargs="+", default=["none", "teacher"], choices=["none", "teacher"])
    parser.add_argument("--lr", nargs="+", default=["1e-3", "3e-4"])
    parser.add_argument("--steps", nargs="+", default=["60", "240"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1"])
    args = parser.parse_args()
    if args.report:
        report(read_scored(args.report))
    else:
        run(cells(args), args)


if __name__ == "__main__":
    main()
