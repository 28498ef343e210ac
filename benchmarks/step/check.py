"""The first and last elements of each parameter: what modules run on during a step, and the step's noise.

Each parameter is read where a module that owns it runs: there it is perturbed, in place or for that forward alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.spec import direction_seed

from ..bench.registry import Wrong

_WINDOW = 256


class Windows:
    """The first and last elements of each parameter that an optimizer trains, as one float64 vector on the CPU.

    Attributes:
        first: the step at which it was made; steps are counted from there.
        thresholds: of the magnitude masks; infinite for a parameter without one.
        rms: β, δ, v and w of `normalize="rms"`, none for others.
    """

    def __init__(self, optimizer: zo.ZeroOrderOptimizer, model: nn.Module):
        state = optimizer.state_dict()["zo"]
        every = [p for group in optimizer.param_groups for p in group["params"]]
        trained = [i for i, p in enumerate(every) if p.requires_grad]
        self.optimizer, self.model, self.first = optimizer, model, optimizer.step_count
        self.params = [every[i] for i in trained]
        (self.dtype,) = {p.dtype for p in self.params}
        self._ids = [state["param_ids"][i] for i in trained]
        heights = [state["thresholds"][i] for i in trained]
        self.thresholds = [math.inf if h is None else h for h in heights]
        self.rms = state.get("rms", [])
        names = {p: name for name, p in model.named_parameters()}
        self.names = [names[p] for p in self.params]
        self._ranges = [_ranges(p.numel()) for p in self.params]
        self.sizes = [sum(b - a for a, b in ranges) for ranges in self._ranges]

    def _cut(self, i: int) -> Tensor:
        flat = self.params[i].detach().view(-1)
        return torch.cat([flat[a:b] for a, b in self._ranges[i]]).cpu().double()

    def read(self) -> Tensor:
        return torch.cat([self._cut(i) for i in range(len(self.params))])

    def watched(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Evaluate a loss; return it and the weights that modules ran on: all of them, the same ones everywhere."""
        seen: dict[int, Tensor] = {}
        index = {p: i for i, p in enumerate(self.params)}

        def look(module: nn.Module, args: Any) -> None:
            for i in [index[p] for p in module._parameters.values() if p in index]:
                now = self._cut(i)
                if not torch.equal(seen.setdefault(i, now), now):
                    raise Wrong(f"modules run on different values of {self.names[i]}")

        hooks = [m.register_forward_pre_hook(look) for m in self.model.modules()]
        try:
            value = loss()
        finally:
            for hook in hooks:
                hook.remove()
        if unseen := [name for i, name in enumerate(self.names) if i not in seen]:
            raise Wrong(f"no module ran that owns {', '.join(unseen)}")
        return value, torch.cat([seen[i] for i in range(len(self.params))])

    def drawn(self, draw: Callable[[Tensor, int, int, str], Tensor], step: int, slot: int = 0) -> Tensor:
        """Draw a number for each element, as the specification does in a step of the optimizer's distribution."""
        seed, distribution = direction_seed(self.optimizer.seed, self.first + step, slot), self.optimizer.distribution
        each = zip(self._ids, self._ranges, strict=True)
        return torch.cat([draw(torch.arange(a, b), seed, i, distribution) for i, ranges in each for a, b in ranges])

    def spread(self, values: list[float]) -> Tensor:
        """A value for each parameter, repeated for each of its elements here."""
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(self.sizes))

    def off(self, got: Tensor, expected: Tensor, limit: Tensor | float = 0.0) -> str | None:
        """How many elements are further apart than the limit, and the parameter of the first; None if none is."""
        off = ~((got - expected).abs() <= limit)  # a NaN is off too
        if not off.any():
            return None
        first = torch.searchsorted(torch.tensor(self.sizes).cumsum(0), int(off.nonzero()[0]), right=True)
        return f"{int(off.sum())} of {len(off)} weights looked at are off, first in {self.names[int(first)]}"


def _ranges(n: int) -> list[tuple[int, int]]:
    return [(0, n)] if n <= 2 * _WINDOW else [(0, _WINDOW), (n - _WINDOW, n)]
