"""A step as a CUDA graph: all its launches, those of the model included, cost the host one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, device

from ..backends.transfer import on_device, signed
from ..interrupts import at_once, signals_held
from ..trajectory import Kind
from .alone import alone
from .attempt import Attempt
from ..closures.losses import Closure, OutOfRange, Refused, call, value_of
from ..estimators.numbers import Numbers, spsa_update
from ..closures.losses import Pair
from ..weights.rows import Row
from .operations import Operation, Operations, first_difference
from ..weights.overflow import unusable
from ..weights.tables import Weights

if TYPE_CHECKING:
    from ..optim.base import ZeroOrderOptimizer


def cannot_be_graphed(where: device) -> str | None:
    """Why not, or None."""
    return None if where.type == "cuda" else f"graphs need weights on a CUDA device, got {where}"


def captured(body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What repeats the device's work of `body`, and what `body` returned, which every repetition writes anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return graph.replay, result


def differs_when_captured(closure: Closure, where: device) -> str | None:
    """Why a captured closure does not always return the bits that it returns otherwise, or None if it does.

    Its operations are compared first. What is captured cannot look at a value on the device, so if they are the same,
    no value can make them others, in this batch or in another. Equal losses would not tell: one batch may happen to
    have them, and only the next decide otherwise. The losses are compared all the same, for kernels that PyTorch does
    not see or that add in no fixed order.

    The closure is called at the weights as they are, twice, and its captured work is done once. Each time, and after
    it, random numbers are those of before. The graph's memory is given back.

    Args:
        closure: it has been called before; what is done at the first call alone would be taken for a difference.
        where: the device of its losses.
    """
    generators = [where] if where.type == "cuda" else []  # and the CPU's
    lists: list[list[Operation]] = []

    def noted() -> Any:
        with Operations() as operations:
            loss = call(closure)
        lists.append(operations.seen)
        return value_of(loss)[1]

    with torch.random.fork_rng(generators):
        ordinary = noted()
    if not isinstance(ordinary, Tensor):
        return None  # which the capture says, if it is wrong
    with torch.random.fork_rng(generators):
        replay, loss = captured(noted)
    with torch.random.fork_rng(generators):
        replay()
    if (found := first_difference(*lists[:2])) is not None:
        first, second = (f"{op.name} ({op.at})" if op is not None else "its end" for op in found)
        return (
            f"its operations are others: where it has {first}, captured it has {second}. A graph repeats one path, "
            "while an ordinary call may choose by the batch: transformers does by a two-dimensional attention_mask, "
            "and without one by position_ids if use_cache=False. Give a four-dimensional one (README, On a GPU), or "
            "none where padding is on the right and attention is causal (transformers 5.18 or later)"
        )
    if not torch.equal(ordinary.view(torch.int64), loss.view(torch.int64)):  # NaN has bits, too
        return (
            f"its loss is another at the same weights: {ordinary.item()!r}, captured {loss.item()!r}, by the same "
            "operations, so one of them is not deterministic (dropout, a sum of atomic additions)"
        )
    return None


class GraphedStep:
    """Steps of an optimizer that are captured once and then repeated; see `ZeroOrderOptimizer.graphed`."""

    def __init__(self, optimizer: ZeroOrderOptimizer, closure: Closure, warmup: int, same_bits: bool):
        self._optimizer, self._closure, self._warmup, self._same_bits = optimizer, closure, warmup, same_bits
        self._warm_for: tuple[Any, ...] | None = None
        self._captured_for: tuple[Any, ...] | None = None
        self._ordinary_steps = 0

    def __call__(self) -> Tensor | float:
        """One step; returns the mean of its losses.

        Raises:
            ValueError: the closure returns losses that are not on the device, or, with `same_bits`, is not the same
                when it is captured. No step is taken.
        """
        taken = self._captured_step()
        return self._optimizer.step(self._closure) if taken is None else taken

    @alone("graphed")
    def _captured_step(self) -> Tensor | None:
        """One step, or None if an ordinary one is due."""
        optimizer = self._optimizer
        optimizer._prepare()
        key = optimizer._launches_depend_on()
        if key != self._captured_for and (key != self._warm_for or self._ordinary_steps < self._warmup):
            self._ordinary_steps += 1
            self._warm_for = key
            return None
        with Attempt(optimizer) as attempt:
            attempt.begin()
            eps, rates, decays, weights = optimizer._begin()
            if (why := unusable(rates, decays)) is not None:
                raise Refused(OutOfRange, why, of="")
            if key != self._captured_for:
                self._check(weights.theta[0].device)
                self._capture(weights, eps, rates, decays)
                self._captured_for = key
            self._seeds.copy_(self._on_device([signed(s) for s in optimizer._seeds()], torch.int64))
            self._rates.copy_(self._on_device(rates, torch.float64))
            if isinstance(self._decays, Tensor):
                self._decays.copy_(self._on_device(decays, torch.float64))
            attempt.probes = optimizer._probes(weights, None)
            with signals_held():
                weights.torn = True
                self._replay()
                torch.autograd.graph.increment_version([w for w in weights.theta if not w.is_inference()])
                taking = optimizer._taking(attempt, weights, Kind.STEP, rates, eps, self._numbers, self._pairs)
                at_once([*taking, partial(setattr, weights, "torn", False)])
            optimizer._taken(attempt, weights)
            return self._loss.clone()

    def _check(self, where: device) -> None:
        if not self._same_bits:
            return
        try:
            difference = differs_when_captured(self._closure, where)
        except Refused as error:
            raise error.error(f"closure: {error}; no step was taken") from None
        if difference is not None:
            raise ValueError(
                f"graphed: expected a closure that is the same when it is captured, but {difference}; or take the "
                "captured one as it is, whose losses may differ from those of opt.step, with same_bits=False"
            )

    def _on_device(self, values: Any, dtype: torch.dtype) -> Tensor:
        return on_device(values, dtype, self._seeds.device)

    def _capture(self, weights: Weights, eps: float, rates: list[float], decays: list[float]) -> None:
        optimizer, where = self._optimizer, weights.theta[0].device
        self._seeds = torch.zeros(optimizer.directions, dtype=torch.int64, device=where)
        self._rates = torch.zeros(len(rates), dtype=torch.float64, device=where)
        self._decays: Row = torch.zeros_like(self._rates) if any(d != 1.0 for d in decays) else decays

        def body() -> tuple[Tensor, Numbers, list[Pair]]:
            seeds = list(self._seeds.unbind())
            probes = optimizer._probes(weights, None)
            seen: list[Any] = []
            pairs = optimizer._evaluate(probes, self._closure, seeds, eps, seen)
            if not all(isinstance(value, Tensor) for pair in pairs for value in pair):
                got = f"one on {seen[0].device}" if isinstance(seen[0], Tensor) else type(seen[0]).__name__
                raise ValueError(f"closure: expected losses on {where}, for a graph, got {got}")
            numbers = Numbers.of([pairs], eps, self._rates, self._decays, reach=weights.reach)
            probes.finish(spsa_update(seeds, numbers.gradients[0], numbers.rates), numbers.decays, [])
            return sum(seen) / len(seen), numbers, pairs

        try:
            self._replay, (self._loss, self._numbers, self._pairs) = captured(body)
        except Refused as error:
            raise error.error(f"closure: {error}; no step was taken") from None
        self._in_use = optimizer._memory_in_use()
