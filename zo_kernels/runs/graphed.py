"""A step as a CUDA graph: the host makes one launch for the whole step, the model's forwards included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, device

from ..backends.transfer import on_device, signed
from ..closures.losses import Closure, OutOfRange, Pair, Refused, call, value_of
from ..estimators.numbers import Numbers
from ..estimators.protocol import Estimate, Losses, Step, evaluate
from ..estimators.spsa import SPSA
from ..interrupts import Call, at_once, signals_held
from ..weights.groups import eps_of, rates_of, weight_decays_of
from ..weights.overflow import unusable
from ..weights.rows import Row, decay_factors
from ..weights.tables import Weights
from .attempt import Attempt, alone
from .operations import Operation, Operations, first_difference
from .run import Progress, Run


def cannot_be_graphed(run: Run, where: device) -> str | None:
    """Say why the steps of a run, of weights on a device, cannot be captured; None if they can."""
    if run.ranks is not None:
        return "ranks exchange their losses in every step"
    if run.perturbation.execution_device is not None:
        return "with execution_device, weights are copied to where the forward runs in every step"
    if run.estimator.why_steps_differ is not None:
        return run.estimator.why_steps_differ
    if type(run.estimator).estimate is not SPSA.estimate:
        return f"{type(run.estimator).__name__} is an estimator of your own"
    if run.trained.drop:
        return "with drop, every step changes other weights"
    return None if has_graphs(where) else f"graphs need weights on a CUDA device, got {where}"


def has_graphs(where: device) -> bool:
    """Say whether work on a device can be captured."""
    return where.type == "cuda"


def captured(body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture `body` in a graph.

    Returns:
        A function that repeats the device's work, and what `body` returned; each repetition overwrites its tensors.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return graph.replay, result


def differs_when_captured(closure: Closure, where: device) -> str | None:
    """Say why a closure does not return the same bits when it is captured; None if it does.

    First its operations are compared with those of an ordinary call. A captured closure cannot read a value on the
    device, so if the operations are equal for one batch, they are equal for all. Equal losses would not show that: one
    batch may have equal losses, and the next take another path. The losses are compared too, because PyTorch does not
    see all kernels, and some add in no fixed order.

    The closure is called twice at the current weights, and its captured work runs once. Random states are restored
    after each, and the graph's memory is freed.

    Args:
        closure: it must have been called before: what only a first call does would be taken for a difference.
        where: the device of its losses.
    """
    generators = [where] if where.type == "cuda" else []  # besides the CPU's
    lists: list[list[Operation]] = []

    def noted() -> Any:
        with Operations() as operations:
            loss = call(closure)
        lists.append(operations.seen)
        return value_of(loss)[1]

    with torch.random.fork_rng(generators):
        ordinary = noted()
    if not isinstance(ordinary, Tensor):
        return None  # the capture raises for this loss
    with torch.random.fork_rng(generators):
        replay, loss = captured(noted)
    with torch.random.fork_rng(generators):
        replay()
    if (found := first_difference(*lists[:2])) is not None:
        first, second = (f"{op.name} ({op.at})" if op is not None else "its end" for op in found)
        return (
            f"it calls other operations then: {second} in place of {first}. A graph repeats one path, "
            "while an ordinary call may choose by the batch: transformers does by a two-dimensional attention_mask, "
            "and without one by position_ids if use_cache=False. Give a four-dimensional one (docs/backends.md, A step "
            "as one CUDA graph), or none where padding is on the right and attention is causal (transformers 5.18 or "
            "later)"
        )
    if not torch.equal(ordinary.view(torch.int64), loss.view(torch.int64)):  # NaN has bits, too
        return (
            f"its loss differs at the same weights: {ordinary.item()!r}, captured {loss.item()!r}, by the same "
            "operations, so one of them is not deterministic (dropout, a sum of atomic additions)"
        )
    return None


class Steps(Protocol):
    """The parts of an optimizer that a graph of its steps uses."""

    _run: Run
    param_groups: list[dict[str, Any]]

    def step(self, closure: Closure) -> Any:
        """Take an ordinary step."""

    def _prepare(self) -> Weights:
        """Return valid tables."""

    def _begin(self, progress: Progress, *closures: Closure) -> Step:
        """Check and prepare all that a step needs."""


class GraphedStep:
    """Takes steps of an optimizer that are captured once and then repeated; see `ZeroOrderOptimizer.graphed`."""

    def __init__(self, optimizer: Steps, closure: Closure, warmup: int, same_bits: bool):
        self._optimizer, self._closure, self._warmup, self._same_bits = optimizer, closure, warmup, same_bits
        self._run = optimizer._run
        estimator: Any = self._run.estimator
        self._estimator: SPSA = estimator
        self._warm_for: tuple[Any, ...] | None = None
        self._captured_for: tuple[Any, ...] | None = None
        self._ordinary_steps = 0

    def __call__(self) -> Tensor | float:
        """Take one step; return the mean of its losses.

        Raises:
            ValueError: the closure returns losses that are not on the device, or, with `same_bits`, does something
                else when it is captured. No step is taken.
        """
        taken = self._captured_step()
        loss: Tensor | float = self._optimizer.step(self._closure) if taken is None else taken
        return loss

    @alone("graphed")
    def _captured_step(self) -> Tensor | None:
        """Take a captured step and return its loss; None if an ordinary step is due."""
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
            self._sums.copy_(self._estimator.normalizer.sums(self._sums.device))
            step.probes(None)
            with signals_held():
                weights.torn = True
                self._replay()
                torch.autograd.graph.increment_version([w for w in weights.theta if not w.is_inference()])
                kind, normalizer = self._estimator.kind, self._numbers.normalizer.kept()
                estimate = Estimate(kind, Losses(self._pairs, []), self._numbers, _nothing, step.rates)
                noted = partial(setattr, self._estimator, "normalizer", normalizer)
                at_once([*run.taking(progress, estimate, step.eps), noted, partial(setattr, weights, "torn", False)])
            run.taken(progress, weights)
            return self._loss.clone()

    def _launches_depend_on(self) -> tuple[Any, ...]:
        """Return all that decides what a step launches. Launches read seeds, rates and decays from memory."""
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

        # Capturing moves no weight, so there is nothing to restore after an exception.
        unnoted = replace(step, note_probes=lambda probes: None)
        self._sums = self._estimator.normalizer.sums(where)

        def body() -> tuple[Tensor, Numbers, list[Pair]]:
            estimator = SPSA(self._estimator.difference, self._estimator.normalizer.with_sums(self._sums))
            seeds, losses = list(self._seeds.unbind()), Losses([], [], estimator.difference)
            probes = unnoted.probes(None)
            evaluate(probes, self._closure, seeds, step.eps, losses)
            if not all(isinstance(value, Tensor) for pair in losses.pairs for value in pair):
                first = losses.seen[0]
                got = f"one on {first.device}" if isinstance(first, Tensor) else type(first).__name__
                raise ValueError(f"closure: expected losses on {where}, for a graph, got {got}")
            numbers = estimator.numbers(losses.pairs, step, self._rates, self._decays)
            estimator.finish_step(probes, seeds, numbers, [])
            mean: Any = losses.mean(several_ranks=False)
            return mean, numbers, losses.pairs

        try:
            self._replay, (self._loss, self._numbers, self._pairs) = captured(body)
        except Refused as error:
            raise error.error(f"closure: {error}; no step was taken") from None
        self._in_use = [weights, step.place.memory_in_use()]


def _nothing(then: Sequence[Call]) -> None:
    """The graph has updated the weights already."""
