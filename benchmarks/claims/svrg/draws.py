"""What runs draw, so that an optimizer and a restatement of its formula can be given the same."""

from __future__ import annotations

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels.estimators.draws import FIRST_SLOT, direction_seeds
from zo_kernels.names import param_ids

from .problems import BATCH, Problem


class Draws:
    """Directions and minibatches of the runs of some seeds; what was drawn once is kept."""

    def __init__(self, problem: Problem, seeds: tuple[int, ...]):
        self.problem, self.seeds = problem, seeds
        self._ids = param_ids(problem.shapes)
        self._directions: dict[tuple[int, int], Tensor] = {}
        self._batches: dict[int, Tensor] = {}

    def directions(self, step: int, slot: int = FIRST_SLOT) -> Tensor:
        """z of each seed's step, float32 (seeds, dimension)."""
        if (step, slot) not in self._directions:
            self._directions[step, slot] = torch.stack([self.direction(seed, step, slot) for seed in self.seeds])
        return self._directions[step, slot]

    def direction(self, seed: int, step: int, slot: int = FIRST_SLOT) -> Tensor:
        """z as an optimizer with this seed draws it, float32 (dimension,)."""
        (chosen,) = direction_seeds(seed, step, 1, slot)
        where = self.problem.x.device
        return torch.cat(
            [
                zo.noise(shape, seed=chosen, param_id=self._ids[name], device=where).flatten()
                for name, shape in self.problem.shapes.items()
            ]
        )

    def batches(self, step: int) -> Tensor:
        """Indices of the minibatch of each seed's step, (seeds, BATCH)."""
        if step not in self._batches:
            self._batches[step] = torch.stack([batch(self.problem, seed, step) for seed in self.seeds])
        return self._batches[step]


def batch(problem: Problem, seed: int, step: int) -> Tensor:
    """Indices of a minibatch, drawn without replacement and anew in every step."""
    generator = torch.Generator().manual_seed(2**20 * seed + step)
    return torch.randperm(problem.examples, generator=generator)[:BATCH].to(problem.x.device)
