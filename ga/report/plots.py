"""The pictures of a search's report, as PNG files. Each `draw_` function draws one, or returns False where there is
nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ga.report.confirmation import Confirmed
from ga.report.effects import Models
from ga.report.plot_course import draw_best_so_far, draw_generations
from ga.report.plot_effects import draw_effects
from ga.report.plot_genes import draw_genes
from ga.report.plot_trust import draw_early_late, draw_seed_noise
from ga.study.evaluations import Evaluation

EFFECTS = "effects.png"


@dataclass(frozen=True)
class Plot:
    file: str
    caption: str


def draw_all(
    folder: Path,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    confirmed: Confirmed,
    *,
    heuristics: Mapping[str, str],
    population: int,
    effects: Models,
    labels: Sequence[str],
) -> list[Plot]:
    """Draws what there is something to draw of. Returns the files in `folder`, in order. labels: of the genes."""
    drawings: list[tuple[str, str, Callable[[Path], bool]]] = [
        (
            "best_so_far.png",
            "Best fitness so far by evaluation, against other searches and the heuristics",
            lambda path: draw_best_so_far(path, evaluations, others, heuristics),
        ),
        (
            "generations.png",
            "Fitness by generation",
            lambda path: draw_generations(path, evaluations, population, heuristics),
        ),
        (
            EFFECTS,
            "What each teacher layer is worth to each student layer",
            lambda path: draw_effects(path, effects, labels),
        ),
        (
            "genes.png",
            "Teacher layer of each student layer among the best genomes",
            lambda path: draw_genes(path, evaluations, heuristics),
        ),
        (
            "seed_noise.png",
            "Fitness of the confirmed genomes with each new seed",
            lambda path: draw_seed_noise(path, confirmed, heuristics),
        ),
        (
            "early_late.png",
            "Intermediate fitness against final fitness",
            lambda path: draw_early_late(path, evaluations),
        ),
    ]
    return [Plot(file, caption) for file, caption, draw in drawings if draw(folder / file)]
