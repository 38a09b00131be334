"""Does a searched mapping make a better student than a guessed one? The paper's procedure, from search to fine-tuning.

    python launch/search.py --config examples/search.yaml --config examples/glue.yaml --output_dir runs/found …
    taskset -c 0 python benchmarks/evidence.py --search runs/found --work runs/evidence --out 0.csv --shard 0/2 …
    python benchmarks/evidence.py --search … --work … --finetune --out finetuned.csv
    python benchmarks/evidence.py --search … --report 0.csv 1.csv --finetuned finetuned.csv

docs/evidence.md has the plan, which was written down first: regime, comparisons, primary outcome. Everything resumes.
The winner and the usual guesses are distilled as long proxies of one teacher pass each (panel.py says how), and scored
on the tasks that were searched on and on others. Controls: uniform trained longer by what the search cost, and uniform
at other learning rates. `--finetune` fine-tunes every student, with three seeds.

The report: means over seeds with 95 % intervals (Student's t), and the winner against each other student at equal
seeds.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import yaml
from campaign import TASKS, Cell, Row, arguments, as_difference, as_mean, read, read_scored, run
from measuring import header
from panel import FINETUNED_SEEDS, check_regime, finetuned_rows, regime_arguments
from pilot import REGIMES, SCHEDULE, corpus_of, dashed, teacher_and_text, tokens_per_step

OTHERS = ("CoLA", "RTE")
"""Tasks that are probed and were not searched on."""
FINETUNED = ("CoLA", "RTE", "STS-B", "SST-2")
WINNER, LONGER = "winner", "uniform, longer"
GUESSES = {"last": "last", "drawn": "random:7", "none": "none"}
"""Students with the first seeds only."""
LEARNING_RATES = {"uniform, lr 5e-4": "5e-4", "uniform, lr 2e-3": "2e-3"}
"""Beside the default, 1e-3."""
FEW = 2
WARMUP_STEPS = 60
SAVE_EVERY = 300


def shape(args: Namespace) -> tuple[str, ...]:
    """Settings of teacher, student and text."""
    regime = REGIMES[args.regime]
    return (*regime.student(str(regime.init)), *teacher_and_text(args, args.regime))


def found(args: Namespace) -> str:
    """Returns the mapping that the search recommends."""
    text = (args.search / "best.yaml").read_text(encoding="utf-8")
    return str(yaml.safe_load(text)["mapping"]["hidden"])


def cells(args: Namespace) -> Iterator[Cell]:
    """Students of one seed, learning rate and length side by side; what is longer goes on in the folder of its seed."""
    regime = REGIMES[args.regime]
    tokens = tokens_per_step(corpus_of(args, args.regime))
    students = {WINNER: found(args), "uniform": dashed(regime.genes("uniform"))}
    guesses = {name: dashed(regime.genes(text)) for name, text in GUESSES.items()}

    def cell(kind: str, folder: str, seed: int, steps: int, lr: str, named: dict[str, str]) -> Cell:
        columns = {"students": kind, "seed": str(seed), "steps": str(steps), "tokens": str(round(steps * tokens))}
        length = ("--proxy.steps", str(steps), "--proxy.save_every", str(SAVE_EVERY), *SCHEDULE)
        more = ("--train.warmup_steps", str(WARMUP_STEPS), "--train.lr", lr, "--proxy.keep_students", "true")
        settings = (*shape(args), *length, *more, "--seed", str(seed))
        members = tuple(dict.fromkeys(named.values()))
        return Cell(columns, settings, members, (*TASKS, *OTHERS), args.work.resolve() / folder)

    for seed in range(args.seeds):
        few = guesses if seed < FEW else {}
        yield cell("mappings", f"seed{seed}", seed, args.steps, "1e-3", students | few)
    uniform = {"uniform": students["uniform"]}
    for seed in range(FEW):
        for name, lr in LEARNING_RATES.items():
            yield cell(name, f"seed{seed}-lr{lr}", seed, args.steps, lr, uniform)
    for seed in range(FEW):
        yield cell(LONGER, f"longer-seed{seed}", seed, args.steps + args.more_steps, "1e-3", uniform)


def finetuned_cells(args: Namespace) -> Iterator[Cell]:
    for cell in cells(args):
        for genome in cell.genomes:
            assert cell.folder is not None
            student = cell.folder / "students" / f"{genome}-seed{cell.columns['seed']}"
            columns = {"students": cell.columns["students"], "seed": cell.columns["seed"], "genome": genome}
            yield Cell(columns, ("--model.path", str(student)), (genome,), tasks=FINETUNED)


def names_of(rows: Sequence[Row], winner: str, uniform: str) -> dict[str, list[Row]]:
    """Returns the rows by student."""
    named: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kind = row["students"]
        own = {winner: WINNER, uniform: "uniform"}.get(row["genome"], row["genome"])
        named[own if kind == "mappings" else kind].append(row)
    return dict(named)


def by_seed(rows: Sequence[Row], task: str) -> dict[str, float]:
    """Returns the score of each seed: the mean over its fine-tunings, where there are several."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        scores[row["seed"]].append(float(row[task]))
    return {seed: fmean(values) for seed, values in scores.items()}


def print_table(title: str, students: dict[str, list[Row]], tasks: Sequence[str]) -> None:
    print(f"## {title}\n")
    print(header("student", "mapping", "seeds", "core-hours a student", *tasks, "mean"))
    for name, rows in students.items():
        scores = {task: by_seed(rows, task) for task in tasks}
        seeds = sorted(scores[tasks[0]])
        columns = [[scores[task][seed] for seed in seeds] for task in tasks]
        columns.append([fmean(values) for values in zip(*columns, strict=True)])
        hours = sum(float(row["core_seconds"]) for row in rows) / 3600 / len(seeds)
        shown = [as_mean(values) for values in columns]
        print(f"| {name} | {rows[0]['genome']} | {len(seeds)} | {hours:.2f} | {' | '.join(shown)} |")
    print("\nThe winner, less the other at equal seeds\n")
    print(header("than", "pairs", *tasks, "mean"))
    for name, rows in students.items():
        if name != WINNER:
            pairs = [differences(students[WINNER], rows, task) for task in tasks]
            pairs.append([fmean(values) for values in zip(*pairs, strict=True)])
            print(f"| {name} | {len(pairs[0])} | {' | '.join(as_difference(values) for values in pairs if values)} |")
    print()


def differences(rows: Sequence[Row], others: Sequence[Row], task: str) -> list[float]:
    ours, theirs = by_seed(rows, task), by_seed(others, task)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def report(args: Namespace) -> None:
    uniform = dashed(REGIMES[args.regime].genes("uniform"))
    probed = names_of(read_scored(args.report, (*TASKS, *OTHERS)), found(args), uniform)
    if WINNER not in probed:
        print("The search recommends uniform." if found(args) == uniform else "No winner is distilled yet.")
        return
    print_table("Probed, tasks that were searched on", probed, TASKS)
    print_table("Probed, other tasks", probed, OTHERS)
    if args.finetuned:
        tuned = names_of(read(args.finetuned), found(args), uniform)
        seeds = f"{len(FINETUNED_SEEDS)} seeds each"
        print_table(f"Fine-tuned, {seeds}, tasks that were searched on", tuned, [t for t in FINETUNED if t in TASKS])
        print_table(f"Fine-tuned, {seeds}, other tasks", tuned, [t for t in FINETUNED if t not in TASKS])


def main() -> None:
    parser = arguments(__doc__)
    regime_arguments(parser)
    parser.add_argument("--search", type=Path, required=True, metavar="FOLDER", help="a search that has ended")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--more_steps", type=int, default=2800, help="of uniform, longer: what the search cost")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--finetune", action="store_true", help="fine-tune the students that are distilled")
    parser.add_argument("--finetuned", type=Path, nargs="+", default=[], metavar="CSV", help="for the report")
    args = parser.parse_args()
    if args.report:
        report(args)
        return
    check_regime(parser, args)
    if args.finetune:
        run(list(finetuned_cells(args)), args, finetuned_rows)
    else:
        run(list(cells(args)), args)


if __name__ == "__main__":
    main()
