"""The pictures of a search's report, as PNG files. Each `draw_` function draws one, or returns False where there is
nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ga.report.confirmation import Confirmed
from ga.report.effects import Models
from ga.report.facts import Facts
from ga.report.plot_course import draw_best_so_far, draw_generations
from ga.report.plot_effects import draw_effects
from ga.report.plot_genes import draw_genes
from ga.report.plot_trust import draw_early_late, draw_seed_noise
from ga.study.evaluations import Evaluation

BEST_SO_FAR, EFFECTS, SEED_NOISE = "best_so_far.png", "effects.png", "seed_noise.png"


@dataclass(frozen=True)
class Plot:
    file: str
    caption: str


def draw_all(
    folder: Path,
    facts: Facts,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    confirmed: Confirmed,
    effects: Models,
) -> list[Plot]:
    """Draws what there is something to draw of. Returns the files in `folder`, in order."""
    drawings: list[tuple[str, str, Callable[[Path], bool]]] = [
        (
            BEST_SO_FAR,
            "Best fitness so far by evaluation, against other searches, the heuristics, the teacher and the untrained "
            "student",
            lambda path: draw_best_so_far(path, facts, evaluations, others),
        ),
        ("generations.png", "Fitness by generation", lambda path: draw_generations(path, facts, evaluations)),
        (
            EFFECTS,
            "What each teacher layer is worth to each student layer",
            lambda path: draw_effects(path, facts, effects),
        ),
        (
            "genes.png",
            "Teacher layer of each student layer among the best genomes",
            lambda path: draw_genes(path, facts, evaluations),
        ),
        (
            SEED_NOISE,
            "Fitness of the confirmed genomes with each new seed, and their differences to uniform",
            lambda path: draw_seed_noise(path, facts, confirmed),
        ),
        (
            "early_late.png",
            "Intermediate fitness against final fitness",
            lambda path: draw_early_late(path, facts, evaluations),
        ),
    ]
    return [Plot(file, caption) for file, caption, draw in drawings if draw(folder / file)]
