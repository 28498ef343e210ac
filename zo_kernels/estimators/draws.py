"""What a step draws: a function of the run's seed and of the step alone (docs/noise.md, 6)."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import direction_seed
from ..weights.blocks import dropped_blocks

MAX_DIRECTIONS = 2**16
FIRST_SLOT = 0
ANCHOR_SLOT = 2**17  # directions of the estimate at MeZO-SVRG's anchor when the anchor is taken
SEPARATE_SLOT = 2**18  # directions of the later estimates at the anchor, if they do not share those at θ
BLOCK_SLOT = 2**20 - 1


@dataclass(frozen=True, slots=True)
class Draws:
    """Of one step."""

    seed: int
    step: int
    directions: int
    drop: float
    blocks: int

    def seeds(self, slot: int = FIRST_SLOT) -> list[int]:
        """The seed of each direction."""
        return [direction_seed(self.seed, self.step, slot + k) for k in range(self.directions)]

    def dropped(self) -> frozenset[int]:
        """Indices of the transformer blocks that are left alone."""
        if not self.drop:
            return frozenset()
        return dropped_blocks(self.blocks, self.drop, direction_seed(self.seed, self.step, BLOCK_SLOT))
