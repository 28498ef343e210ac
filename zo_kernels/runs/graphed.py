"""A step as a CUDA graph: all its launches, those of the model included, cost the host one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, device

from ..backends.transfer import on_device, signed
from ..closures.losses import Closure, OutOfRange, Pair, Refused, call, value_of
from ..estimators.numbers import Numbers, spsa_update
from ..estimators.protocol import Estimate, Losses, Step, evaluate
from ..interrupts import Call, at_once, signals_held
from ..trajectory import Kind
from ..weights.groups import eps_of, rates_of, weight_decays_of
from ..weights.overflow import unusable
from ..weights.rows import Row, decay_factors
from ..weights.tables import Weights
from .attempt import Attempt, alone
from .operations import Operation, Operations, first_difference
from .run import Progress, Run


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
            "and without one by position_ids if use_cache=False. Give a four-dimensional one (docs/backends.md, A step "
            "as one CUDA graph), or none where padding is on the right and attention is causal (transformers 5.18 or "
            "later)"
        )
    if not torch.equal(ordinary.view(torch.int64), loss.view(torch.int64)):  # NaN has bits, too
        return (
            f"its loss is another at the same weights: {ordinary.item()!r}, captured {loss.item()!r}, by the same "
            "operations, so one of them is not deterministic (dropout, a sum of atomic additions)"
        )
    return None


class Steps(Protocol):
    """What a graph needs of the optimizer whose steps it takes."""

    _run: Run
    param_groups: list[dict[str, Any]]

    def step(self, closure: Closure) -> Any:
        """An ordinary step."""

    def _prepare(self) -> Weights:
        """Make the tables valid."""

    def _begin(self, progress: Progress, *closures: Closure) -> Step:
        """Begin a step."""


class GraphedStep:
    """Steps of an optimizer that are captured once and then repeated; see `ZeroOrderOptimizer.graphed`."""

    def __init__(self, optimizer: Steps, closure: Closure, warmup: int, same_bits: bool):
        self._optimizer, self._closure, self._warmup, self._same_bits = optimizer, closure, warmup, same_bits
        self._run = optimizer._run
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
        loss: Tensor | float = self._optimizer.step(self._closure) if taken is None else taken
        return loss

    @alone("graphed")
    def _captured_step(self) -> Tensor | None:
        """One step, or None if an ordinary one is due."""
        optimizer, run = self._optimizer, self._run
        optimizer._prepare()
        key = self._launches_depend_on()
        if key != self._captured_for and (key != self._warm_for or self._ordinary_steps < self._warmup):
            self._ordinary_steps += 1
            self._warm_for = key
            return None
        attempt = Attempt(run, optimizer.param_groups)
        with attempt as progress:
            attempt.begin()
            step = optimizer._begin(progress, self._closure)
            weights, decays = step.weights, decay_factors(step.rates, step.weight_decays)
            if (why := unusable(step.rates, decays)) is not None:
                raise Refused(OutOfRange, why, of="")
            if key != self._captured_for:
                self._check(weights.theta[0].device)
                self._capture(step, decays)
                self._captured_for = key
            self._seeds.copy_(self._on_device([signed(s) for s in step.draws.seeds()], torch.int64))
            self._rates.copy_(self._on_device(step.rates, torch.float64))
            if isinstance(self._decays, Tensor):
                self._decays.copy_(self._on_device(decays, torch.float64))
            step.probes(None)
            with signals_held():
                weights.torn = True
                self._replay()
                torch.autograd.graph.increment_version([w for w in weights.theta if not w.is_inference()])
                estimate = Estimate(Kind.STEP, Losses(self._pairs, []), self._numbers, _nothing, step.rates)
                at_once([*run.taking(progress, estimate, step.eps), partial(setattr, weights, "torn", False)])
            run.taken(progress, weights)
            return self._loss.clone()

    def _launches_depend_on(self) -> tuple[Any, ...]:
        """All that decides what a step launches, but for the numbers that launches read from memory."""
        run, groups = self._run, self._optimizer.param_groups
        decays = decay_factors(rates_of(groups), weight_decays_of(groups))
        return run.trained.builds, eps_of(groups), run.directions, any(d != 1.0 for d in decays)

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

    def _capture(self, step: Step, decays: list[float]) -> None:
        weights, rates, where = step.weights, step.rates, step.weights.theta[0].device
        self._seeds = torch.zeros(self._run.directions, dtype=torch.int64, device=where)
        self._rates = torch.zeros(len(rates), dtype=torch.float64, device=where)
        self._decays: Row = torch.zeros_like(self._rates) if any(d != 1.0 for d in decays) else decays

        # What is captured has not moved anything yet, so there is nothing to restore.
        unnoted = replace(step, note_probes=lambda probes: None)

        def body() -> tuple[Tensor, Numbers, list[Pair]]:
            seeds, losses = list(self._seeds.unbind()), Losses([], [])
            probes = unnoted.probes(None)
            evaluate(probes, self._closure, seeds, step.eps, losses)
            if not all(isinstance(value, Tensor) for pair in losses.pairs for value in pair):
                first = losses.seen[0]
                got = f"one on {first.device}" if isinstance(first, Tensor) else type(first).__name__
                raise ValueError(f"closure: expected losses on {where}, for a graph, got {got}")
            numbers = Numbers.of([losses.pairs], step.eps, self._rates, self._decays, reach=weights.reach)
            probes.finish(spsa_update(seeds, numbers.gradients[0], numbers.rates), numbers.decays, [])
            mean: Any = losses.mean(several_ranks=False)
            return mean, numbers, losses.pairs

        try:
            self._replay, (self._loss, self._numbers, self._pairs) = captured(body)
        except Refused as error:
            raise error.error(f"closure: {error}; no step was taken") from None
        self._in_use = [weights, step.place.memory_in_use()]


def _nothing(then: Sequence[Call]) -> None:
    """The graph has updated the weights already."""
