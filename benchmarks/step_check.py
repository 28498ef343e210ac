"""Is a step right? Every closure call, and the end, are held against the method's formula in float64, on windows.

The noise comes from its specification; the losses are those of the very step that is checked. Of each parameter the
first and the last elements are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.optim.mezo_svrg import _ANCHOR_SLOT
from zo_kernels.spec import direction_seed, normal

_WINDOW = 256
_TOLERANCE = 2.0**-21  # of |θ| + ε|z|: each of the passes in place rounds by up to 2^-24 of it

# Yields the weights that the next closure call must see, is sent its loss, and returns the weights after the step.
Walk = Generator[Tensor, float, Tensor]


class WrongWeights(Exception):
    """The weights are not where the method's formula puts them."""


class Windows:
    """The first and last elements of each parameter of an optimizer, as one float64 vector on the CPU."""

    def __init__(self, optimizer: zo.ZeroOrderOptimizer, model: nn.Module):
        state = optimizer.state_dict()["zo"]
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self._ids, self.thresholds = state["param_ids"], state["thresholds"]
        names = {p: name for name, p in model.named_parameters()}
        self.names = [names[p] for p in self.params]
        self._ranges = [
            (0, n) if n <= 2 * _WINDOW else (0, _WINDOW, n - _WINDOW, n) for n in (p.numel() for p in self.params)
        ]
        self.sizes = [sum(r[1::2]) - sum(r[::2]) for r in self._ranges]

    def read(self) -> Tensor:
        parts = []
        for p, r in zip(self.params, self._ranges, strict=True):
            flat = p.detach().view(-1)
            parts += [flat[a:b].cpu() for a, b in zip(r[::2], r[1::2], strict=True)]
        return torch.cat(parts).double()

    def z(self, step: int, slot: int = 0) -> Tensor:
        """The noise of a step from now on."""
        seed = direction_seed(self.optimizer.seed, self.optimizer.step_count + step, slot)
        parts = []
        for param_id, r in zip(self._ids, self._ranges, strict=True):
            for a, b in zip(r[::2], r[1::2], strict=True):
                parts.append(normal(torch.arange(a, b), seed, param_id))
        return torch.cat(parts).double()

    def spread(self, values: Sequence[float]) -> Tensor:
        """A value for each parameter, repeated for each of its elements here."""
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(self.sizes))

    def moved(self, before: Tensor) -> list[bool]:
        """For each parameter, whether an element has changed."""
        return [bool(part.any()) for part in (self.read() != before).split(self.sizes)]

    def name_of(self, element: int) -> str:
        return self.names[int(torch.searchsorted(torch.tensor(self.sizes).cumsum(0), element, right=True))]


def spsa(windows: Windows, theta: Tensor, mask: Callable[[], Tensor], eps: float, lr: float) -> Walk:
    """θ ± ε m z, then θ - lr g m z. The mask is asked for at the first closure call."""
    z = windows.z(0)
    z = z * mask()
    above = yield theta + eps * z
    below = yield theta - eps * z
    return theta - lr * (above - below) / (2 * eps) * z


def svrg(windows: Windows, theta: Tensor, eps: float, lr: float, anchor_lr: float, steps: int) -> Walk:
    """A full-batch step at the anchor θ̄ = θ, and steps along [estimate(θ) - estimate(θ̄) + g]."""
    noise = [windows.z(0, _ANCHOR_SLOT), *(windows.z(step) for step in range(1, steps))]

    def estimate(at: Tensor, z: Tensor) -> Generator[Tensor, float, Tensor]:
        above = yield at + eps * z
        below = yield at - eps * z
        return (above - below) / (2 * eps) * z

    anchor = theta
    full = yield from estimate(anchor, noise[0])
    theta = anchor - anchor_lr * full
    for z in noise[1:]:
        here = yield from estimate(theta, z)
        there = yield from estimate(anchor, z)
        theta = theta - lr * (here - there + full)
    return theta


def magnitude_mask(windows: Windows, theta: Tensor, sparsity: float) -> Tensor:
    """|θ| <= h, after a look at whether h lets the right number of weights through."""
    for name, p, h in zip(windows.names, windows.params, windows.thresholds, strict=True):
        n = p.numel()
        wanted = n - int(sparsity * n)
        inside, below = int((p.detach().abs() <= h).sum()), int((p.detach().abs() < h).sum())
        if not below < wanted <= inside:
            raise WrongWeights(f"{name}: {inside} of {n} weights are within the threshold {h}, not {wanted}")
    return (theta.abs() <= windows.spread(windows.thresholds)).double()


def block_mask(windows: Windows, theta: Tensor, blocks: Sequence[nn.Module], dropped: int) -> Tensor:
    """Which parameters take part, as seen from what the first pass changed; it must be all but so many whole blocks."""
    moved = dict(zip(windows.params, windows.moved(theta), strict=True))
    of_blocks = [{moved[p] for p in block.parameters()} for block in blocks]
    inside = {p for block in blocks for p in block.parameters()}
    if of_blocks.count({False}) != dropped or of_blocks.count({True}) != len(blocks) - dropped:
        raise WrongWeights(f"expected {dropped} blocks untouched and the others moved, got {of_blocks}")
    if still := [n for n, p in zip(windows.names, windows.params, strict=True) if p not in inside and not moved[p]]:
        raise WrongWeights(f"expected what is outside the blocks to move, got {', '.join(still)} untouched")
    return windows.spread([float(moved[p]) for p in windows.params])


class Check:
    """Follows a step along a walk: `closure` stands in for the loss during it."""

    def __init__(self, windows: Windows, theta: Tensor, walk: Walk, loss: Callable[[], Tensor], eps: float):
        self._windows, self._walk, self._loss = windows, walk, loss
        self._limit = _TOLERANCE * (theta.abs() + 7 * eps)  # no |z| is larger
        self._last: float | None = None
        self._calls = 0

    def closure(self) -> Tensor:
        self._calls += 1
        try:
            expected = next(self._walk) if self._last is None else self._walk.send(self._last)
        except StopIteration:
            raise WrongWeights(f"closure call {self._calls} is one too many") from None
        self._compare(expected, f"at closure call {self._calls}")
        loss = self._loss()
        self._last = loss.item()
        return loss

    def finish(self) -> None:
        """To be called after the step."""
        if self._last is None:
            raise WrongWeights("the closure was not called")
        try:
            self._walk.send(self._last)
        except StopIteration as end:
            self._compare(end.value, "after the step")
        else:
            raise WrongWeights(f"expected more closure calls than {self._calls}")

    def _compare(self, expected: Tensor, when: str) -> None:
        off = ~((self._windows.read() - expected).abs() <= self._limit)  # a NaN is off too
        if off.any():
            first = self._windows.name_of(int(off.nonzero()[0]))
            raise WrongWeights(f"{when} {int(off.sum())} of {len(off)} weights looked at are off, first in {first}")
