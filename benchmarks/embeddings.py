"""A sentence encoder's student: our losses beside the layer reduction of sentence-transformers, on the same corpus.

    pip install 'sentence-transformers[train]'
    python launch/prepare_data.py --sources '[{path: data/raw/news.jsonl}]' --pack unit --output_dir data/sentences
    taskset -c 0 python benchmarks/embeddings.py --work runs/embeddings --out embeddings.csv
    python benchmarks/embeddings.py --report embeddings.csv

layer_reduction.py is theirs. Where the student is narrower, both start from the same one, ours before its first step:
sentence-transformers makes no narrow student from a teacher. Ours trains `loss.pooled`, alone or beside the hidden
states of mapped layers.

Each recipe gets its learning rates with the first seed; that with the best STS-B of training rows gets the other seeds.
Scores are those of sentence-transformers' own evaluators: Spearman for STS-B, average precision of the cosine for MRPC
and RTE, on dev rows. A seed draws another order of sentences. One thread each; seconds are of the processor, with
loading.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from campaign import Cell, Row, arguments, as_difference, as_mean, read, run, run_script
from measuring import header
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
)

from engine.config.finetune import TaskDataConfig
from engine.tasks.load import load_task
from engine.tasks.rows import Split

TEACHER, START, THEIRS = "teacher", "start", "theirs"
SHAPES = {"3x384": (), "3x192": ("--student.hidden_size", "192")}
OURS = {"pooled": ("--loss.hidden", "0", "--loss.embedding", "0"), "pooled, hidden": ()}
RATES = {**dict.fromkeys(OURS, ("3e-4", "1e-3")), THEIRS: ("1e-4", "3e-4", "1e-3")}
"""1e-4 is that of their documentation."""
BATCH = "64"
SCORES = {"STS-B train": ("STS-B", "train"), **{name: (name, "dev") for name in ("STS-B", "MRPC", "RTE")}}
TRAINING_ROWS = 1500
SIMILAR = {"MRPC": 1, "RTE": 0}
"""Label of pairs whose vectors should be alike: a paraphrase, entailment."""


def cells(args: Namespace, rows: Sequence[Row]) -> Iterator[Cell]:
    """The untrained students, the learning rates, and the other seeds of those that are the best of `rows`."""

    def cell(shape: str, recipe: str, lr: str, seed: str, steps: str, words: Sequence[str]) -> Cell:
        columns = {"shape": shape, "recipe": recipe, "lr": lr, "seed": seed, "steps": steps}
        folder = args.work.resolve() / "-".join(columns.values()).replace(", ", "+")
        return Cell(columns, tuple(words), (), folder=folder)

    for shape in args.shapes:
        student = SHAPES[shape]
        ours = ["launch/distill.py", "--config", "examples/embeddings.yaml", *student, "--data.path", args.corpus]
        ours += ["--train.global_batch", BATCH, "--train.eval_every", args.steps, "--train.save_every", args.steps]
        start = cell(shape, START, "-", "0", "0", [*ours, "--train.steps", "1", "--train.lr", "1e-9"])
        yield start
        theirs = ["benchmarks/layer_reduction.py", "--corpus", args.corpus, "--batch", BATCH]
        theirs += ["--student", f"{start.folder}/student"] if student else []
        for recipe, rates in RATES.items():
            tried = [(lr, args.seeds[0]) for lr in rates]
            best = best_rate(rows, shape, recipe)
            for lr, seed in dict.fromkeys([*tried, *((best, seed) for seed in args.seeds if best)]):
                length = ["--lr", lr, "--seed", seed, "--steps", args.steps]
                if recipe in OURS:
                    length = ["--train.lr", lr, "--seed", seed, "--train.steps", args.steps, *OURS[recipe]]
                yield cell(shape, recipe, lr, seed, args.steps, [*(ours if recipe in OURS else theirs), *length])


def best_rate(rows: Sequence[Row], shape: str, recipe: str) -> str:
    """Returns the best one by STS-B of training rows and the first seed; nothing before all have been tried."""
    tried: dict[str, float] = {}
    for row in rows:
        if (row["shape"], row["recipe"]) == (shape, recipe):
            tried.setdefault(row["lr"], float(row["STS-B train"]))
    return max(tried, key=tried.__getitem__) if tried.keys() >= set(RATES[recipe]) else ""


def student_rows(cell: Cell, settings: Sequence[str]) -> list[Row]:
    """settings: `--task.data_dir` and its value."""
    assert cell.folder is not None
    seconds = run_script(cell.settings, str(cell.folder))
    found = scores(str(cell.folder / "student"), settings[1])
    return [{**cell.columns, **found, "core_seconds": f"{seconds:.1f}"}]


def scores(path: str, data_dir: str) -> Row:
    model = SentenceTransformer(path)
    found = {}
    for column, (name, split) in SCORES.items():
        rows = load_task(name, TaskDataConfig(data_dir=data_dir, train_rows=TRAINING_ROWS)).splits[split]
        assert isinstance(rows, Split)
        assert rows.second is not None
        assert rows.labels is not None
        if name in SIMILAR:
            labels = (rows.labels == SIMILAR[name]).astype(int).tolist()
            pairs = BinaryClassificationEvaluator(rows.first, rows.second, labels, similarity_fn_names=["cosine"])
            found[column] = pairs(model)["cosine_ap"]
        else:
            similar = EmbeddingSimilarityEvaluator(
                rows.first, rows.second, rows.labels.tolist(), main_similarity="cosine"
            )
            found[column] = similar(model)["spearman_cosine"]
    return {column: f"{value:.6f}" for column, value in found.items()}


def report(rows: Sequence[Row], teacher: Row) -> None:
    dev = [name for name in SCORES if SCORES[name][1] == "dev"]
    print("Means over seeds with 95 % intervals (Student's t); share: of the teacher's STS-B\n")
    print(header("shape", "recipe", "lr", "seeds", "steps", *dev, "share", "core-seconds"))
    print(f"| | {TEACHER} | | | | {' | '.join(f'{float(teacher[name]):.4f}' for name in dev)} | | |")
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["shape"], row["recipe"], row["lr"]].append(row)
    for key, some in groups.items():
        found = {name: [float(row[name]) for row in some] for name in (*dev, "core_seconds")}
        shown = [as_mean(found[name]) for name in dev]
        share, cost = fmean(found["STS-B"]) / float(teacher["STS-B"]), fmean(found["core_seconds"])
        print(f"| {' | '.join((*key, str(len(some)), some[0]['steps'], *shown, f'{share:.1%}', f'{cost:.0f}'))} |")
    print("\nOurs less theirs at equal seeds, each at its best learning rate\n")
    print(header("shape", "recipe", "against", *dev, "seeds"))
    for shape, recipe, other in ((shape, *pair) for shape in SHAPES for pair in PAIRS):
        of = [best_seeds(rows, shape, name) for name in (recipe, other)]
        if seeds := sorted(of[0].keys() & of[1].keys()):
            gains = [as_difference([float(of[0][s][name]) - float(of[1][s][name]) for s in seeds]) for name in dev]
            print(f"| {' | '.join((shape, recipe, other, *gains, str(len(seeds))))} |")


PAIRS = [*((recipe, THEIRS) for recipe in OURS), ("pooled, hidden", "pooled")]


def best_seeds(rows: Sequence[Row], shape: str, recipe: str) -> dict[str, Row]:
    lr = best_rate(rows, shape, recipe)
    return {row["seed"]: row for row in rows if (row["shape"], row["recipe"], row["lr"]) == (shape, recipe, lr)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for runs and students")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--corpus", default="data/sentences")
    parser.add_argument("--steps", default="200")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--teacher", default="models/all-MiniLM-L6-v2")
    args = parser.parse_args()
    if args.report:
        report(read(args.report), scores(args.teacher, args.task_dir))
        return
    if args.work is None:
        parser.error("--out needs --work")
    for _ in range(2):  # the other seeds follow the learning rates
        run(list(cells(args, read([args.out]))), args, student_rows)


if __name__ == "__main__":
    main()
