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


def direction_seeds(seed: int, step: int, directions: int, slot: int = FIRST_SLOT) -> list[int]:
    """The seed of each direction of a step."""
    return [direction_seed(seed, step, slot + k) for k in range(directions)]


def blocks_to_drop(seed: int, step: int, n_blocks: int, drop: float) -> frozenset[int]:
    """Indices of the transformer blocks that a step leaves alone."""
    return dropped_blocks(n_blocks, drop, direction_seed(seed, step, BLOCK_SLOT)) if drop else frozenset()


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
        return direction_seeds(self.seed, self.step, self.directions, slot)

    def dropped(self) -> frozenset[int]:
        """Indices of the transformer blocks that are left alone."""
        return blocks_to_drop(self.seed, self.step, self.blocks, self.drop)
