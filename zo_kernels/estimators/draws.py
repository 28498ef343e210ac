"""The random choices of a step, derived from the run's seed and the step count alone (docs/noise.md, 6)."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import direction_seed
from ..weights.blocks import dropped_blocks

MAX_DIRECTIONS = 2**16
FIRST_SLOT = 0
ANCHOR_SLOT = 2**17  # directions of MeZO-SVRG's full-batch estimate, when it takes an anchor
SEPARATE_SLOT = 2**18  # directions of its minibatch estimates at the anchor, unless they share those at θ
BLOCK_SLOT = 2**20 - 1


def direction_seeds(seed: int, step: int, directions: int, slot: int = FIRST_SLOT) -> list[int]:
    """Return the seed of each direction of a step."""
    return [direction_seed(seed, step, slot + k) for k in range(directions)]


def blocks_to_drop(seed: int, step: int, n_blocks: int, drop: float) -> frozenset[int]:
    """Return the indices of the transformer blocks that a step leaves alone."""
    return dropped_blocks(n_blocks, drop, direction_seed(seed, step, BLOCK_SLOT)) if drop else frozenset()


@dataclass(frozen=True, slots=True)
class Draws:
    """What one step draws.

    Attributes:
        seed: of the run.
        step: steps taken before.
        directions: how many directions the step has.
        drop: the fraction of transformer blocks that it leaves alone.
        blocks: how many transformer blocks there are.
    """

    seed: int
    step: int
    directions: int
    drop: float
    blocks: int

    def seeds(self, slot: int = FIRST_SLOT) -> list[int]:
        """Return the seed of each direction."""
        return direction_seeds(self.seed, self.step, self.directions, slot)

    def dropped(self) -> frozenset[int]:
        """Return the indices of the transformer blocks that the step leaves alone."""
        return blocks_to_drop(self.seed, self.step, self.blocks, self.drop)
