"""A second implementation of steps in place, in a few lines over `zo.add_noise_`: the library's are compared with it.

It also takes the steps that the library has no option for: momentum from replayed scalars.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import direction_seeds

from ..arms import EPS


@dataclass(frozen=True)
class Kind:
    """How a step estimates, and how it finds its size.

    Args:
        directions: of a step.
        one_sided: losses at θ + ε z_k and at θ; else at θ + ε z_k and θ - ε z_k.
        normalize: "none", "std" (of the step's slopes; FZOO, arXiv 2506.09034) or "rms" (the root of an exponential
            mean of their squares; MEAZO, arXiv 2605.03869).
        distribution: of z.
        beta, delta: of "rms".
        momentum: the factor by which a step's slopes count in the next one, and how many steps it replays.
    """

    directions: int = 1
    one_sided: bool = False
    normalize: str = "none"
    distribution: str = "normal"
    beta: float = 0.99
    delta: float = 1e-8
    momentum: tuple[float, int] = (0.0, 1)

    @property
    def forwards(self) -> int:
        return self.directions + 1 if self.one_sided else 2 * self.directions


class Twin:
    """Steps of a `Kind`, in place."""

    def __init__(self, model: nn.Module, lr: float, seed: int, *, kind: Kind, backend: str | None):
        mezo = zo.MeZO(model, lr=lr, eps=EPS, seed=seed, parallel="off", perturb="in_place")
        ids = mezo.state_dict()["zo"]["param_ids"]
        known = zip((p for group in mezo.param_groups for p in group["params"]), ids, strict=True)
        trained = [(p, each) for p, each in known if p.requires_grad]
        self.params = [p for p, _ in trained]
        self._lr, self._seed, self._kind, self._steps = lr, seed, kind, 0
        self._square = self._weight = 0.0
        self._options = {
            "param_ids": [each for _, each in trained],
            "backend": backend,
            "distribution": kind.distribution,
        }
        self._replayed: deque[dict[int, float]] = deque(maxlen=kind.momentum[1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        kind, where = self._kind, dict[int, float]()
        seeds = direction_seeds(self._seed, self._steps, kind.directions)
        self._steps += 1

        def loss_at(offset: dict[int, float]) -> float:
            self._move(where, offset)
            return closure().item()

        if kind.one_sided:
            here = loss_at({})
            slopes = [(loss_at({s: EPS}) - here) / EPS for s in seeds]
        else:
            pairs = [(loss_at({s: EPS}), loss_at({s: -EPS})) for s in seeds]
            slopes = [(above - below) / (2 * EPS) for above, below in pairs]
        if not all(map(math.isfinite, slopes)):
            raise ValueError("a loss is not finite")
        size = self._size(slopes)
        decay = kind.momentum[0]
        self._replayed = deque(({s: decay * g for s, g in old.items()} for old in self._replayed), kind.momentum[1])
        self._replayed.append({s: g / size for s, g in zip(seeds, slopes, strict=True)})
        along = {s: g for old in reversed(self._replayed) for s, g in old.items()}
        self._move(where, {s: -self._lr * g / kind.directions for s, g in along.items()})
        return here if kind.one_sided else pairs[0][0]

    def _move(self, where: dict[int, float], to: dict[int, float]) -> None:
        """Go from one sum of directions to another by one pass over those that they differ in."""
        scales = {s: to.get(s, 0.0) - where.get(s, 0.0) for s in (*where, *(s for s in to if s not in where))}
        if scales:
            zo.add_noise_(self.params, list(scales), list(scales.values()), **self._options)
        where.clear()
        where.update(to)

    def _size(self, slopes: Sequence[float]) -> float:
        kind = self._kind
        if kind.normalize == "std":
            mean = sum(slopes) / len(slopes)
            return math.sqrt(sum((g - mean) * (g - mean) for g in slopes) / (len(slopes) - 1))
        if kind.normalize == "rms":
            square = sum(g * g for g in slopes) / len(slopes)
            self._square = kind.beta * self._square + (1 - kind.beta) * square
            self._weight = kind.beta * self._weight + (1 - kind.beta)
            return math.sqrt(self._square / self._weight) + kind.delta
        return 1.0
