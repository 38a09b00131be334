"""The pictures of a search's report, as PNG files. Each function draws one, or returns False where there is nothing to
draw. Figures are made without pyplot, so no display and no global state is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.mapping import MappingPair
from ga.report.confirmation import Confirmed, Difference, compare, seed_deviation
from ga.report.figures import new_figure, save, spread, whole_numbers
from ga.study.evaluations import Evaluation, correlation_at, evaluated, ranked, report_steps
from ga.view.progress import blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, GREY, DARK = "#0072B2", "#767676", "#222222"
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""Okabe and Ito's palette, told apart by dashes too."""
TOP_SHARE = 0.25
MOST_PANELS = 4
MOST_LABELLED_CELLS = 200
LABEL_GAP = 0.055
"""Least distance of two labels beside a plot, as a share of its height."""


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
) -> list[Plot]:
    """Draws what there is something to draw of. Returns the files in `folder`, in order."""
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


def draw_best_so_far(
    path: Path,
    evaluations: Sequence[Evaluation],
    others: Mapping[str, Sequence[Evaluation]],
    heuristics: Mapping[str, str],
) -> bool:
    """Other searches are drawn as far as this one has come: equal budget."""
    spent = evaluated(evaluations)
    values = _fitness(spent)
    if not np.isfinite(values).any():
        return False
    figure, (axes,) = new_figure(1, width=9.5, height=4.8)
    places = np.arange(1, len(values) + 1)
    axes.plot(places, values, "o", color=OWN, alpha=0.3, markersize=4, markeredgewidth=0, label="one evaluation")
    best = [_best_so_far(values)]
    axes.step(places, best[0], where="post", color=OWN, linewidth=3, label="best so far, this search", zorder=3)
    for i, (name, other) in enumerate(others.items()):
        theirs = _fitness(evaluated(other))
        shown = theirs[: len(values)]
        if not np.isfinite(shown).any():
            continue
        best.append(_best_so_far(shown))
        label = f"best so far, {_shortened(name)}" + (f" (first {len(shown)})" if len(theirs) > len(shown) else "")
        colour, dashes = OTHERS[i % len(OTHERS)], STYLES[(i + i // len(OTHERS)) % len(STYLES)]
        x = np.arange(1, len(shown) + 1)
        axes.step(x, best[-1], where="post", label=label, color=colour, linestyle=dashes, linewidth=1.6, zorder=4)
        if len(shown) == 1:
            axes.plot([1], shown, "D", color=colour, markersize=5)
    _limit_below(axes, values, highest=max(np.nanmax(line) for line in best))
    axes.set_xlim(0.5 if len(values) < 20 else 0, len(values) + max(0.5, 0.01 * len(values)))
    _label_heuristics(axes, _heuristic_fitness(spent, heuristics))
    whole_numbers(axes)
    axes.set(xlabel="evaluations", ylabel="fitness (mean of task scores)", title="Best fitness so far")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=9)
    save(figure, path)
    return True


def _best_so_far(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """NaN before the first fitness."""
    return np.fmax.accumulate(values)


def _limits(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Of an axis: a few very bad genomes (`none` is one) must not flatten the rest."""
    low, quarter, three_quarters, high = np.nanquantile(values, [0, 0.25, 0.75, 1])
    floor = max(low, quarter - 2 * (three_quarters - quarter)) if three_quarters > quarter else low
    margin = 0.05 * (high - floor) or 0.01 * max(abs(high), 1.0)
    return float(floor - margin), float(high + margin)


def _limit_below(axes: Axes, values: npt.NDArray[np.float64], *, highest: float) -> None:
    """Evaluations below the axis get a mark at its foot."""
    floor, ceiling = _limits(values)
    axes.set_ylim(floor, max(ceiling, highest + 0.05 * (highest - floor)))
    below = np.flatnonzero(values < floor)
    if below.size:
        axes.plot(
            below + 1,
            np.full(below.size, 0.012),
            "v",
            transform=axes.get_xaxis_transform(),
            color=OWN,
            alpha=0.45,
            markersize=5,
            markeredgewidth=0,
            label="evaluation below the axis",
        )


def _heuristic_fitness(spent: Sequence[Evaluation], heuristics: Mapping[str, str]) -> dict[str, float]:
    """Label -> fitness; heuristics that are the same genome share a label. Without those that have no fitness."""
    names: dict[str, list[str]] = {}
    for name, genome in heuristics.items():
        names.setdefault(genome, []).append(name)
    fitness = {one.genome: one.fitness for one in ranked(spent) if one.fitness is not None}
    return {" = ".join(named): fitness[genome] for genome, named in names.items() if genome in fitness}


def _label_heuristics(axes: Axes, fitness: Mapping[str, float]) -> None:
    """Horizontal lines with labels on the right, moved apart, each tied to its line; those below the axis at
    its foot."""
    low, high = axes.get_ylim()
    across = axes.get_yaxis_transform()
    order = sorted(fitness, key=lambda label: fitness[label])
    at = [max(0.0, (fitness[label] - low) / (high - low)) for label in order]
    for label, y, text_y in zip(order, at, spread(at, gap=LABEL_GAP), strict=True):
        value = fitness[label]
        if value >= low:
            axes.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axes.plot(
            [1.0, 1.018, 1.03], [y, text_y, text_y], transform=axes.transAxes, color=GREY, linewidth=0.7, clip_on=False
        )
        text = f"{label} {value:.4f}" + (" (below)" if value < low else "")
        axes.text(1.035, low + text_y * (high - low), text, transform=across, va="center", fontsize=9, color=DARK)


def draw_generations(
    path: Path, evaluations: Sequence[Evaluation], population: int, heuristics: Mapping[str, str]
) -> bool:
    """Blocks of `population` evaluations where a sampler has no generations."""
    spent = evaluated(evaluations)
    every = [(block, _fitness(block.evaluations)) for block in blocks(spent, population)]
    every = [(block, values[np.isfinite(values)]) for block, values in every]
    scored = [(block, values) for block, values in every if values.size]
    if not scored:
        return False
    generations = scored[0][0].evaluations[0].generation is not None and scored[0][0].name.startswith("generation")
    x = [float(block.evaluations[0].generation or 0) if generations else float(block.end) for block, _ in scored]
    low, median, high = np.array([np.quantile(values, [0.25, 0.5, 0.75]) for _, values in scored]).T
    figure, (axes,) = new_figure(1, width=8, height=4.5)
    axes.fill_between(x, low, high, color=OWN, alpha=0.18, linewidth=0, label="middle half (quartiles)")
    axes.plot(x, median, "o-", color=OWN, linewidth=1.8, markersize=5, label="median")
    axes.plot(x, [values.max() for _, values in scored], "^--", color=OTHERS[0], markersize=6, label="best of it")
    if len(scored) == 1:
        axes.vlines(x, low, high, color=OWN, alpha=0.3, linewidth=8)
    uniform = _heuristic_fitness(spent, {name: genome for name, genome in heuristics.items() if name == "uniform"})
    for label, value in uniform.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (2, 2)), label=f"{label} {value:.4f}", zorder=1)
    sizes = [len(block.evaluations) for block, _ in scored]
    size = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    axes.set_xlabel(
        f"generation (genomes in each: {size})" if generations else f"evaluations, in blocks of up to {population}"
    )
    axes.set(
        ylabel="fitness (mean of task scores)", title="Fitness by generation" if generations else "Fitness by block"
    )
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
        axes.set_xticks(x)
    else:
        whole_numbers(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=9)
    save(figure, path)
    return True


def draw_genes(path: Path, evaluations: Sequence[Evaluation], heuristics: Mapping[str, str]) -> bool:
    """Share of each teacher layer at each student layer among the best TOP_SHARE; the genes of uniform are framed."""
    best = ranked(evaluations)
    if not best:
        return False
    top = best[: math.ceil(TOP_SHARE * len(best))]
    texts = [one.genome for one in evaluations if one.genome] + list(heuristics.values())
    known = {text: MappingPair.genes_in(text) for text in texts}
    halves = 2 if any(hidden != attention for hidden, attention in known.values()) else 1
    teacher_layers = max(max(hidden + attention) for hidden, attention in known.values())
    students = len(known[top[0].genome][0])
    size = max(2.6 + 0.55 * students, 4.2)
    figure, panels = new_figure(halves, width=size * halves + 0.8, height=max(3.4, 1.8 + 0.4 * (teacher_layers + 1)))
    uniform = heuristics.get("uniform")
    image = None
    for half, axes in enumerate(panels):
        shares = np.zeros((teacher_layers + 1, students))
        for one in top:
            for m, gene in enumerate(known[one.genome][half]):
                shares[gene, m] += 1 / len(top)
        image = axes.imshow(shares, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
        _label_cells(axes, shares)
        for m, gene in enumerate(known[uniform][half] if uniform else ()):
            left, right, foot, top_edge = m - 0.47, m + 0.47, gene - 0.47, gene + 0.47
            axes.plot(
                [left, right, right, left, left], [foot, foot, top_edge, top_edge, foot], color=OTHERS[0], linewidth=1.8
            )
        axes.set_xticks(range(students), [str(m + 1) for m in range(students)])
        axes.set_yticks(range(teacher_layers + 1), ["none", *map(str, range(1, teacher_layers + 1))])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set(xlabel="student layer", ylabel="teacher layer" if half == 0 else "")
        if halves > 1:
            axes.set_title(("hidden states", "attention")[half], fontsize=10)
    framed = "; framed: uniform" if uniform else ""
    figure.suptitle(f"Genes of the best {len(top)} of {len(best)} genomes{framed}", fontsize=11)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, ticks=[0, 0.25, 0.5, 0.75, 1.0], pad=0.02)
    bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.set_label("share of these genomes")
    save(figure, path)
    return True


def _label_cells(axes: Axes, shares: npt.NDArray[np.float64]) -> None:
    if shares.size > MOST_LABELLED_CELLS:
        return
    for (gene, m), share in np.ndenumerate(shares):
        if share > 0:
            colour = "white" if share > 0.55 else DARK
            axes.text(m, gene, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def draw_seed_noise(path: Path, confirmed: Confirmed, heuristics: Mapping[str, str]) -> bool:
    """Left the fitness of each seed, right the differences to uniform at equal seeds with their intervals."""
    confirmed = {genome: by_seed for genome, by_seed in confirmed.items() if by_seed}
    if not confirmed:
        return False
    uniform = heuristics.get("uniform", "")
    order = sorted(confirmed, key=lambda genome: fmean(confirmed[genome].values()))
    differences = {one.genome: one for one in compare(confirmed, uniform) if one.mean is not None}
    figure, panels = new_figure(2 if differences else 1, width=9.5, height=2.0 + 0.55 * len(order), share_y=True)
    axes = panels[0]
    for y, genome in enumerate(order):
        colour = OTHERS[0] if genome == uniform else OWN
        values = list(confirmed[genome].values())
        axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.45, markersize=6, markeredgewidth=0)
        axes.plot([fmean(values)] * 2, [y - 0.28, y + 0.28], color=colour, linewidth=2.4)
        if genome in differences:
            _draw_difference(panels[1], y, differences[genome], confirmed[genome], confirmed[uniform])
    axes.set_yticks(range(len(order)), [_wrapped(genome, genome == uniform) for genome in order])
    axes.set_ylim(-0.6, len(order) - 0.4)
    deviation = seed_deviation(confirmed)
    noise = "" if deviation is None else f"\nstandard deviation between seeds {deviation:.4f}"
    axes.set_title(f"Dots: new seeds, bar: their mean{noise}", fontsize=10)
    axes.set_xlabel("fitness (mean of task scores)")
    if differences:
        panels[1].axvline(0, color=OTHERS[0], linewidth=1.4, linestyle=(0, (2, 2)))
        panels[1].set_title("Difference to uniform at equal seeds\nmean and 95 % interval", fontsize=10)
        panels[1].set_xlabel("fitness minus uniform's")
    for panel in panels:
        panel.locator_params(axis="x", nbins=5)
    save(figure, path)
    return True


def _draw_difference(
    axes: Axes, y: float, difference: Difference, own: Mapping[int, float], uniform: Mapping[int, float]
) -> None:
    single = [own[seed] - uniform[seed] for seed in sorted(own.keys() & uniform.keys())]
    axes.plot(single, [y - 0.22] * len(single), "o", color=OWN, alpha=0.35, markersize=4.5, markeredgewidth=0)
    if difference.low is not None and difference.high is not None:
        axes.plot([difference.low, difference.high], [y, y], color=OWN, linewidth=2, marker="|", markersize=10)
    assert difference.mean is not None
    axes.plot([difference.mean], [y], "D", color=OWN, markersize=6)


def draw_early_late(path: Path, evaluations: Sequence[Evaluation]) -> bool:
    """One panel for each intermediate step; of more than MOST_PANELS, some from the first to the last."""
    steps = report_steps(evaluations)
    if not steps:
        return False
    if len(steps) > MOST_PANELS:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]
    figure, panels = new_figure(len(steps), width=max(4.6, 3.1 * len(steps)), height=3.7, share_y=True)
    for step, axes in zip(steps, panels, strict=True):
        both = [one for one in evaluated(evaluations) if one.fitness is not None and step in one.reports]
        early, late = np.array([one.reports[step] for one in both]), _fitness(both)
        (left, right), (foot, head) = _limits(early), _limits(late)
        axes.set(xlim=(left, right), ylim=(foot, head))
        outside = int(((early < left) | (late < foot)).sum())
        axes.plot(early, late, "o", color=OWN, alpha=0.45, markersize=5, markeredgewidth=0)
        correlation, n = correlation_at(step, evaluations)
        found = "" if correlation is None else f"Spearman {correlation:.2f}, "
        axes.set_title(f"{found}n {n}" + (f" ({outside} outside)" if outside else ""), fontsize=10)
        axes.set_xlabel(f"fitness after step {step}")
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_ylabel("final fitness")
    save(figure, path)
    return True


def _fitness(evaluations: Sequence[Evaluation]) -> npt.NDArray[np.float64]:
    """NaN where there is none."""
    return np.array([np.nan if one.fitness is None else one.fitness for one in evaluations], np.float64)


def _shortened(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _wrapped(genome: str, is_uniform: bool) -> str:
    lines = genome.replace("/", "/\n")
    return f"{lines} (uniform)" if is_uniform else lines
