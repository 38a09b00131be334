"""What the layers of a student know of the layers of the teacher: for each pair, trained or not, how much of the
teacher's state a linear map of the student's explains. It compares mappings by one table, and is never part of a
fitness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from transformers import PreTrainedModel

from engine.config.distill import trained_pairs
from engine.data.batch import Batch
from engine.jobs.distill.build import initial_student, load_teacher
from engine.jobs.proxy.cohort import Cohort, Member
from engine.losses.measure import EVERY_FIFTH, TeacherSlice, real_rows, sequences_of
from engine.models.capture import capture, layer_calls
from engine.models.features import Wanted
from engine.models.install import install
from engine.models.moments import Moments, fit
from engine.ranks.collectives import from_rank_zero
from engine.ranks.runtime import Runtime
from engine.records.layer_table import MEANING, LayerTable, layer_text

TOKENS_PER_DIMENSION = 10
"""Least number of positions that a table looks at, for each dimension of the student's states."""
AT_ONCE = 2048
"""Tokens whose states are held in float64."""
BACKEND = "eager"
"""Attention of the copies that are looked at: it takes fp32 on any device."""


@dataclass(frozen=True)
class Text:
    """A slice of the corpus as the teacher sees it, and which of its tokens are for what."""

    seen: TeacherSlice
    fitted: torch.Tensor
    """(n,) int64 indices of the tokens that maps are fitted on."""
    judging: torch.Tensor
    """(n,) int64 indices of the tokens that judge them, in other sequences."""


def divide(seen: TeacherSlice) -> Text:
    """Divides the tokens of a slice: every fifth sequence judges, or the last one of a few; a repeated one is left
    out."""
    places: dict[bytes, range] = {}
    at = 0
    for batch in seen.batches:
        assert batch.lengths is not None
        for ids, length in zip(batch.input_ids, batch.lengths, strict=True):
            places.setdefault(ids[:length].numpy().tobytes(), range(at, at + length))
            at += length
    every = min(EVERY_FIFTH, len(places))
    tokens: dict[bool, list[int]] = {True: [], False: []}
    for i, place in enumerate(places.values()):
        tokens[i % every == every - 1] += place
    finite = torch.cat(seen.finite)
    fitted, judging = (torch.tensor([at for at in tokens[judges] if finite[at]]) for judges in (False, True))
    return Text(seen, fitted=fitted, judging=judging)


def layer_table(student: PreTrainedModel, text: Text, device: torch.device) -> LayerTable:
    """Returns in row m, column n the R² of the ridge map from the student's hidden state m to the teacher's n, to 4
    decimals; None where a state is not finite. The student, which has been through `install`, runs without dropout on
    `device`, and stays there."""
    layers = sorted(text.seen.hidden[0])
    targets = [torch.cat([states[layer] for states in text.seen.hidden]) for layer in layers]
    width = targets[0].shape[1]
    table: list[list[float | None]] = []
    for states in _states(student, text.seen.batches, device):
        if not bool(states.isfinite().all()):
            table.append([None] * len(layers))
            continue
        judging = _moments(states, targets, text.judging)
        fitted = fit([_moments(states, targets, text.fitted)], [1.0], bias=True)  # one Gram matrix for all of them
        blocks = [slice(i * width, (i + 1) * width) for i in range(len(layers))]
        shares = (judging.select_targets(block).explained(fitted.select_targets(block)) for block in blocks)
        table.append([round(share, 4) for share in shares])
    return table


@torch.no_grad()
def _states(student: PreTrainedModel, batches: Sequence[Batch], device: torch.device) -> list[torch.Tensor]:
    """Returns the student's hidden states of the real tokens, (n, D) for each layer, on the CPU."""
    student.eval().to(device)
    layers = range(layer_calls(student) + 1)
    states: list[list[torch.Tensor]] = [[] for _ in layers]
    for batch in batches:
        features = capture(student, batch.to(device), Wanted(hidden=frozenset(layers)))
        for layer, parts in zip(layers, states, strict=True):
            parts.append(real_rows(features.hidden[layer], batch, features).cpu())
    return [torch.cat(parts) for parts in states]


def _moments(states: torch.Tensor, targets: Sequence[torch.Tensor], tokens: torch.Tensor) -> Moments:
    """Returns the moments of one student layer and of all teacher layers side by side, over these tokens."""
    chunks = tokens.split(AT_ONCE)
    parts = (Moments.from_states(states[rows], torch.cat([y[rows] for y in targets], dim=1)) for rows in chunks)
    return reduce(add, parts)


class LayerTables:
    """The layer tables of a proxy job (proxy.layer_table)."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._text: Text | None = None
        """Text of the current cohort; on rank 0."""
        self._introduction: str | None = None
        """Explanation of the tables; empty once it is printed."""
        self._possible = False
        """Whether there is text enough."""

    def begin(self, cohort: Cohort) -> None:
        """Lets the whole teacher read a slice of the cohort's corpus, and lets it go. A corpus that is too small to fit
        a map has no tables, and `introduce` says so. Collective."""
        base = cohort.base
        layers = frozenset(range(base.teacher_shape.layers + 1))
        teacher = load_teacher(base, Wanted(hidden=layers), self._runtime.device)
        count = max(
            sequences_of(base.config.loss, base.seq_len),
            math.ceil(TOKENS_PER_DIMENSION * base.student_shape.width / base.seq_len),
        )
        text = divide(TeacherSlice(cohort.loader.first_batches(count), teacher, self._runtime.device))
        width = base.student_shape.width
        self._possible = len(text.fitted) > width and len(text.judging) > 0
        if not self._possible:
            self._introduction = (
                f"no layer tables: {base.config.data.path} has {len(text.fitted):,} tokens to fit a map on, and a "
                f"student of width {width} needs more than {width:,}"
            )
            return
        self._text = text if self._runtime.is_rank_zero else None
        if self._introduction is None:
            self._introduction = from_rank_zero(lambda: "\n\n".join([MEANING, *self._starting_tables(cohort, text)]))

    def _starting_tables(self, cohort: Cohort, text: Text) -> list[str]:
        """Returns the tables of what the genomes begin with: that of one student, unless they say which layers it
        starts from."""
        base, genomes = cohort.base, cohort.start.genomes
        plans = {"before training": base}
        if base.config.student.init == "mapping" or any(genome.mapping.kept is not None for genome in genomes):
            plans = {f"{genome.key} before training": genome.start(base) for genome in genomes}
        tables = []
        for title, plan in plans.items():
            anywhere = replace(plan, student_attention=plan.student_attention._replace(name=BACKEND))
            student = initial_student(anywhere, with_mlm_head=False)
            tables.append(layer_text(layer_table(student, text, self._runtime.device), (), title=title))
        return tables

    def introduce(self, say: Callable[[str], None]) -> None:
        """Prints what the tables are, and that of the untrained student, once."""
        if self._introduction:
            say(f"\n{self._introduction}\n")
            self._introduction = ""

    def measure(self, member: Member) -> LayerTable:
        """Returns the table of a student, the same on every rank; empty where there is too little text. Collective."""
        if not self._possible:
            return []
        student = member.copy_student()

        def make() -> LayerTable:
            assert student is not None
            assert self._text is not None
            install(student, BACKEND)
            return layer_table(student, self._text, self._runtime.device)

        return from_rank_zero(make)

    def text_of(self, member: Member, table: LayerTable) -> str:
        """Returns the table of a student as it is printed, with the pairs that were trained."""
        config = member.plan.config
        after = "untrained" if member.trainee is None else f"after {config.train.steps} steps"
        pairs = trained_pairs(config.loss, member.genome.mapping)
        return layer_text(table, pairs, title=f"{member.genome.key}  seed {member.seed}  {after}")
