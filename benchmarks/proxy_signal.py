"""Whether a proxy's fitness tells mappings apart: variance between mappings over variance between seeds.

    python benchmarks/proxy_signal.py --run runs/signal [--long runs/signal-10x] [--evaluators probe finetune] [-- …]

`--run`: output_dir of a proxy job with proxy.repeats > 1 and proxy.keep_students. `--long`: the same genomes with ten
times the steps, for the rank correlation. The kept students are scored again, once by each evaluator, so that both see
the same weights. Settings after `--` change the job's own config.yaml, e.g. `-- --task.train_rows 1000`. Prints
markdown.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from transformers import AutoModel

from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config
from engine.data.batch import Batch
from engine.jobs.proxy.evaluators import build_evaluator
from engine.jobs.proxy.plan import make_proxy_plan
from engine.models.capture import inputs_of
from engine.ranks.runtime import StopRequest, join_ranks
from engine.records.records import read_records
from engine.records.stats import rank_correlation, signal_ratio


class KeptStudent:
    """A student that a proxy job wrote."""

    def __init__(self, folder: Path, seed: int, dtype: torch.dtype) -> None:
        self.folder, self.seed = folder, seed
        self._model = AutoModel.from_pretrained(folder, dtype=dtype, add_pooling_layer=False).eval()

    def hidden(self, batch: Batch) -> torch.Tensor:
        return self._model(**inputs_of(batch)).last_hidden_state

    def save(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def students(run: Path) -> dict[tuple[str, int], Path]:
    found = {
        (r["genome"], r["seed"]): Path(r["student"])
        for r in read_records(run / "records.jsonl")
        if r["kind"] == "result"
    }
    return {key: folder for key, folder in found.items() if folder.is_dir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--long", type=Path)
    parser.add_argument("--evaluators", nargs="+", default=["probe", "finetune"])
    parser.add_argument("--seeds", nargs="+", type=int, help="only these; unset: all")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    config = parse_config(ProxyJobConfig, ["--config", str(args.run / "config.yaml"), *args.settings], "signal")
    runtime = join_ranks(0)
    stop = StopRequest()
    summary = []
    for name in args.evaluators:
        plan = make_proxy_plan(replace(config, proxy=replace(config.proxy, evaluator=name)))
        dtype = getattr(torch, plan.base.execution.precision)
        evaluator = build_evaluator(plan, runtime, stop, args.run / "students" / f".{name}")
        scored: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        began, count = time.perf_counter(), 0
        kept = {key: folder for key, folder in students(args.run).items() if args.seeds is None or key[1] in args.seeds}
        for (genome, seed), folder in kept.items():
            scores = evaluator(KeptStudent(folder, seed, dtype))
            count += 1
            for task, value in {**scores.tasks, "mean": scores.fitness}.items():
                scored[task][genome][seed] = value
        seconds = (time.perf_counter() - began) / count
        tasks = list(scored)
        print(
            f"\n{name}, {seconds:.1f} s a student\n\n| mapping | {' | '.join(tasks)} |\n|{' --- |' * (len(tasks) + 1)}"
        )
        means = {genome: fmean(values.values()) for genome, values in scored["mean"].items()}
        for genome in sorted(means, key=lambda g: -means[g]):
            cells = []
            for task in tasks:
                values = list(scored[task][genome].values())
                cells.append(f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else ""))
            print(f"| {genome} | {' | '.join(cells)} |")
        late = {}
        if args.long is not None:
            late = {
                g: evaluator(KeptStudent(folder, seed, dtype)).fitness
                for (g, seed), folder in students(args.long).items()
            }
            print(
                "\nten times the tokens: "
                + ", ".join(f"{g} {late[g]:.4f}" for g in sorted(late, key=lambda g: -late[g]))
            )
        for task in tasks:
            signal = signal_ratio(scored[task])
            summary.append((name, task, signal, rank_correlation(means, late) if task == "mean" and late else None))
    print(
        "\n| evaluator | score | sd between mappings | sd between seeds | signal ratio | rank correlation with 10x |\n|"
        + " --- |" * 6
    )
    for name, task, signal, rank in summary:
        if signal is not None:
            ratio = "-" if signal.ratio is None else f"{signal.ratio:.1f}"
            print(
                f"| {name} | {task} | {signal.between**0.5:.4f} | {signal.within**0.5:.4f} | {ratio} | "
                f"{'' if rank is None else f'{rank:.2f}'} |"
            )


if __name__ == "__main__":
    main()
