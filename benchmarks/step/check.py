"""Is a step right? What the modules run on in every closure call, and the end, are held against what a walk expects.

The walks here are the methods' formulas in float64; that of `exact_step` is exact. The noise comes from its
specification, and the losses are those of the very step that is checked. Of each parameter the first and the last
elements are looked at, where a module that owns it runs: it sees the weights perturbed, in place or for its forward
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import ANCHOR_SLOT
from zo_kernels.spec import direction_seed, normal, rounding_bits

_WINDOW = 256
# Of |θ| + ε|z|: each of the passes in place rounds by up to 2^-24 of it in float32, and by the last of 8 or of 11 bits
# in the others, which round stochastically.
_TOLERANCE = {torch.float32: 2.0**-21, torch.bfloat16: 3 * 2.0**-7, torch.float16: 3 * 2.0**-10}
_MOST_Z = 7  # no |z| is larger

# Yields the weights that modules must run on in the next closure call, is sent its loss, and returns the weights after
# the step.
Walk = Generator[Tensor, float, Tensor]


class WrongWeights(Exception):
    """The weights are not where the method's formula puts them."""


class Windows:
    """The first and last elements of each parameter that an optimizer trains, as one float64 vector on the CPU.

    Attributes:
        seen: those that the modules ran on in the closure call in question.
        first: the step from which on noise is counted.
        dtype: of the parameters.
    """

    def __init__(self, optimizer: zo.ZeroOrderOptimizer, model: nn.Module):
        state = optimizer.state_dict()["zo"]
        every = [p for group in optimizer.param_groups for p in group["params"]]
        trained = [i for i, p in enumerate(every) if p.requires_grad]
        self.optimizer, self._model, self.first = optimizer, model, optimizer.step_count
        self.params = [every[i] for i in trained]
        (self.dtype,) = {p.dtype for p in self.params}
        self._ids = [state["param_ids"][i] for i in trained]
        heights = [state["thresholds"][i] for i in trained]
        self.thresholds = [math.inf if h is None else h for h in heights]  # of those without, all take part
        names = {p: name for name, p in model.named_parameters()}
        self.names = [names[p] for p in self.params]
        self._index = {p: i for i, p in enumerate(self.params)}
        self._ranges = [_ranges(p.numel()) for p in self.params]
        self.sizes = [sum(b - a for a, b in ranges) for ranges in self._ranges]
        self.seen = self.read()

    def _cut(self, i: int) -> Tensor:
        flat = self.params[i].detach().view(-1)
        return torch.cat([flat[a:b] for a, b in self._ranges[i]]).cpu().double()

    def read(self) -> Tensor:
        return torch.cat([self._cut(i) for i in range(len(self.params))])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what the modules run on. Each parameter must be read, and be the same wherever it is."""
        seen: dict[int, Tensor] = {}

        def look(module: nn.Module, args: Any) -> None:
            for p in module._parameters.values():
                i = None if p is None else self._index.get(p)
                if i is None:
                    continue
                now = self._cut(i)
                if not torch.equal(seen.setdefault(i, now), now):
                    raise WrongWeights(f"modules run on different values of {self.names[i]}")

        hooks = [m.register_forward_pre_hook(look) for m in self._model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if unseen := [name for i, name in enumerate(self.names) if i not in seen]:
            raise WrongWeights(f"no module ran that owns {', '.join(unseen)}")
        self.seen = torch.cat([seen[i] for i in range(len(self.params))])

    def z(self, step: int, slot: int = 0) -> Tensor:
        """The noise of a step, counted from the first."""
        return self._drawn(normal, step, slot).double()

    def rounding_bits(self, step: int, slot: int = 0) -> Tensor:
        """What its stochastic rounding adds."""
        return self._drawn(rounding_bits, step, slot)

    def _drawn(self, draw: Callable[[Tensor, int, int], Tensor], step: int, slot: int) -> Tensor:
        seed = direction_seed(self.optimizer.seed, self.first + step, slot)
        each = zip(self._ids, self._ranges, strict=True)
        return torch.cat([draw(torch.arange(a, b), seed, i) for i, ranges in each for a, b in ranges])

    def spread(self, values: Sequence[float]) -> Tensor:
        """A value for each parameter, repeated for each of its elements here."""
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(self.sizes))

    def moved(self, before: Tensor) -> list[bool]:
        """For each parameter, whether the modules saw an element changed."""
        return [bool(part.any()) for part in (self.seen != before).split(self.sizes)]

    def name_of(self, element: int) -> str:
        return self.names[int(torch.searchsorted(torch.tensor(self.sizes).cumsum(0), element, right=True))]


def _ranges(n: int) -> list[tuple[int, int]]:
    return [(0, n)] if n <= 2 * _WINDOW else [(0, _WINDOW), (n - _WINDOW, n)]


def rounding(theta: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """How far from a formula the passes may leave weights of a type."""
    return _TOLERANCE[dtype] * (theta.abs() + _MOST_Z * eps)


def spsa(windows: Windows, theta: Tensor, mask: Callable[[], Tensor], eps: float, lr: float) -> Walk:
    """θ ± ε m z, then θ - lr g m z. The mask is asked for at the first closure call."""
    z = windows.z(0)
    z = z * mask()
    above = yield theta + eps * z
    below = yield theta - eps * z
    return theta - lr * (above - below) / (2 * eps) * z


def svrg(windows: Windows, theta: Tensor, eps: float, lr: float, anchor_lr: float, steps: int) -> Walk:
    """A full-batch step at the anchor θ̄ = θ, and steps along [estimate(θ) - estimate(θ̄) + g]."""
    noise = [windows.z(0, ANCHOR_SLOT), *(windows.z(step) for step in range(1, steps))]

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
        if h == math.inf:  # equal magnitudes, which a threshold does not part
            at = p.detach().abs().float().flatten().kthvalue(wanted).values
            h, within = float(at), int((p.detach().abs() <= at).sum())
            if h > 0.0 and within <= 2 * wanted and 2 * (n - within) >= n - wanted:
                raise WrongWeights(f"{name}: all of it takes part, and {h} would part it well")
            continue
        inside, below = int((p.detach().abs() <= h).sum()), int((p.detach().abs() < h).sum())
        if not below < wanted <= inside:
            raise WrongWeights(f"{name}: {inside} of {n} weights are within the threshold {h}, not {wanted}")
    return (theta.abs() <= windows.spread(windows.thresholds)).double()


def block_mask(windows: Windows, theta: Tensor, blocks: Sequence[nn.Module], dropped: int) -> Tensor:
    """Which parameters take part, as seen from what modules ran on first; it must be all but so many whole blocks."""
    moved = dict(zip(windows.params, windows.moved(theta), strict=True))
    of_blocks = [{moved[p] for p in block.parameters()} for block in blocks]
    inside = {p for block in blocks for p in block.parameters()}
    if of_blocks.count({False}) != dropped or of_blocks.count({True}) != len(blocks) - dropped:
        raise WrongWeights(f"expected {dropped} blocks untouched and the others moved, got {of_blocks}")
    if still := [n for n, p in zip(windows.names, windows.params, strict=True) if p not in inside and not moved[p]]:
        raise WrongWeights(f"expected what is outside the blocks to move, got {', '.join(still)} untouched")
    return windows.spread([float(moved[p]) for p in windows.params])


class Check:
    """Follows a step along a walk: `closure` stands in for the loss during it; `limit` is how far off is not wrong."""

    def __init__(self, windows: Windows, walk: Walk, loss: Callable[[], Tensor], limit: Tensor):
        self._windows, self._walk, self._loss, self._limit = windows, walk, loss, limit
        self._calls: list[tuple[Tensor, float]] = []

    def closure(self) -> Tensor:
        with self._windows.watched():
            loss = self._loss()
        self._calls.append((self._windows.seen, loss.item()))
        return loss

    def finish(self) -> None:
        """To be called after the step, which the comparisons would slow down: optimizers may watch all operations."""
        if not self._calls:
            raise WrongWeights("the closure was not called")
        value: float | None = None
        for call, (seen, loss) in enumerate(self._calls, 1):
            self._windows.seen = seen
            try:
                expected = next(self._walk) if value is None else self._walk.send(value)
            except StopIteration:
                raise WrongWeights(f"closure call {call} is one too many") from None
            self._compare(seen, expected, f"at closure call {call}")
            value = loss
        assert value is not None
        try:
            self._walk.send(value)
        except StopIteration as end:
            self._compare(self._windows.read(), end.value, "after the step")
        else:
            raise WrongWeights(f"expected more closure calls than {len(self._calls)}")

    def _compare(self, got: Tensor, expected: Tensor, when: str) -> None:
        off = ~((got - expected).abs() <= self._limit)  # a NaN is off too
        if off.any():
            first = self._windows.name_of(int(off.nonzero()[0]))
            raise WrongWeights(f"{when} {int(off.sum())} of {len(off)} weights looked at are off, first in {first}")
