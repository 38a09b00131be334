"""How the sequences of an optimizer step are shared out over ranks and micro steps: of a corpus and of a task alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepShare:
    """The part of every step that one rank trains on.

    Micro step i of rank r takes `micro_batch` of the step's sequences from (i * world + r) * micro_batch on. So the
    sequences of a step depend neither on the number of ranks nor on the micro batch.
    """

    global_batch: int
    """Sequences per optimizer step over all ranks."""
    micro_batch: int
    """Sequences per rank and forward pass."""
    rank: int = 0
    world: int = 1
    """Number of ranks."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world, self
        assert self.global_batch % (self.micro_batch * self.world) == 0, self  # config/deepspeed.py sees to it

    @property
    def micro_steps(self) -> int:
        """Micro steps of one step."""
        return self.global_batch // (self.micro_batch * self.world)

    def part(self, micro: int, rank: int) -> slice:
        """Returns the places within the step that `rank` takes in micro step `micro`, both from 0."""
        first = (micro * self.world + rank) * self.micro_batch
        return slice(first, first + self.micro_batch)
