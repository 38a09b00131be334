"""Whether a training-free score of a mapping says anything about its fitness: against an enumerated landscape.

    python benchmarks/layer_prior.py [--landscape benchmarks/landscapes/minilm_3_from_6.csv] [-- SETTINGS OF THE PROXY]

For each student layer m and teacher layer g, from the initial student and the teacher on one batch of the corpus:

- residual: |T|^2 - tr(C' G^-1 C) with G = S'S, C = S'T, divided by |T|^2: what the best projection of the student's
  hidden states S to the teacher's T leaves unexplained;
- distance: |S - T|^2 / |T|^2, what the hidden loss starts from without a projection (equal widths only);
- CKA: linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414).

A genome's score is the sum over its layers; a layer without loss counts as the mean over all pairs. The table shows
Spearman's correlation with fitness, over all genomes and over those without zeros, for "close" = good. A prior that
helps a search has it clearly above 0.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config
from engine.hub.files import safety
from engine.jobs.distill.build import initial_student, open_corpus
from engine.jobs.distill.plan import make_plan
from engine.jobs.proxy.plan import run_config
from engine.mapping import MappingPair
from engine.ranks.runtime import join_ranks
from engine.records.stats import rank_correlation

Pair = Callable[[torch.Tensor, torch.Tensor], float]
"""(tokens, student width), (tokens, teacher width) -> how far the two are from each other."""


def residual(s: torch.Tensor, t: torch.Tensor) -> float:
    gram = s.T @ s + 1e-6 * (s * s).sum() / s.shape[1] * torch.eye(s.shape[1], dtype=s.dtype)
    cross = s.T @ t
    return 1.0 - float((cross * torch.linalg.solve(gram, cross)).sum() / (t * t).sum())


def distance(s: torch.Tensor, t: torch.Tensor) -> float:
    return float(((s - t) ** 2).sum() / (t * t).sum())


def cka_distance(s: torch.Tensor, t: torch.Tensor) -> float:
    s, t = s - s.mean(0), t - t.mean(0)
    return 1.0 - float((s.T @ t).norm() ** 2 / ((s.T @ s).norm() * (t.T @ t).norm()))


MEASURES: dict[str, Pair] = {"residual": residual, "distance": distance, "CKA": cka_distance}


def hidden_states(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer (without the embeddings): real tokens only, in float64."""
    with torch.no_grad():
        states = model.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return [state[mask.bool()].double() for state in states[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscape", type=Path, default=Path(__file__).parent / "landscapes" / "minilm_3_from_6.csv")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    settings = args.settings or ["--config", "examples/proxy.yaml", "--student.hidden_size", "null"]
    plan = make_plan(run_config(parse_config(ProxyJobConfig, ["--genomes", '["uniform"]', *settings], "prior")))
    join_ranks(plan.config.seed)
    teacher = AutoModel.from_pretrained(plan.config.teacher.path, trust_remote_code=False, **safety())
    student = initial_student(plan, with_mlm_head=False).base_model
    batch = open_corpus(plan).step(0).micro[0]
    ids, mask = batch.input_ids, batch.attention_mask
    if mask is None:
        mask = torch.ones_like(ids)
    of_student, of_teacher = hidden_states(student, ids, mask), hidden_states(teacher, ids, mask)
    with args.landscape.open(encoding="utf-8", newline="") as rows:
        fitness = {row["genome"]: float(row["fitness"]) for row in csv.DictReader(rows)}
    print(f"{len(fitness)} genomes of {args.landscape}, {int(mask.sum()):,} tokens of {plan.config.data.path}\n")
    print("| measure | all genomes | without zeros |")
    print("| --- | --- | --- |")
    for name, measure in MEASURES.items():
        table = np.array([[measure(s, t) for t in of_teacher] for s in of_student])
        mean = float(table.mean())
        closeness, whole = {}, {}
        for genome in fitness:
            genes, _, _ = MappingPair.genes_in(genome)
            closeness[genome] = -sum(float(table[m, g - 1]) if g else mean for m, g in enumerate(genes))
            if 0 not in genes:
                whole[genome] = closeness[genome]
        correlations = [rank_correlation(some, fitness) for some in (closeness, whole)]
        print(f"| {name} | " + " | ".join("none" if r is None else f"{r:+.2f}" for r in correlations) + " |")


if __name__ == "__main__":
    main()
