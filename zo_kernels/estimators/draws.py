"""What a step draws, as a function of the run's seed and the step alone (docs/noise.md, 6)."""

from __future__ import annotations

from ..spec import direction_seed
from ..weights.blocks import dropped_blocks

MAX_DIRECTIONS = 2**16
FIRST_SLOT = 0
ANCHOR_SLOT = 2**17  # directions of the estimate of MeZO-SVRG's anchor
SEPARATE_SLOT = 2**18  # directions of the estimate at the anchor, when it does not share those at θ
BLOCK_SLOT = 2**20 - 1


def direction_seeds(seed: int, step: int, directions: int, slot: int = FIRST_SLOT) -> list[int]:
    """The seed of each direction."""
    return [direction_seed(seed, step, slot + k) for k in range(directions)]


def blocks_to_drop(seed: int, step: int, n_blocks: int, drop: float) -> frozenset[int]:
    """The indices of the blocks that sit out a step."""
    return dropped_blocks(n_blocks, drop, direction_seed(seed, step, BLOCK_SLOT)) if drop else frozenset()
