"""Closures that raise or return no loss: weights come back, the step does not count."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import block_mlp, real_loss
from scripted import (
    EPS,
    LR,
    METHODS,
    SEED,
    Script,
    assert_close,
    assert_same,
    magnitude,
    run,
    snapshot,
    take_step,
)
from tolerances import step_in_place
from torch import nn

import zo_kernels as zo
from zo_kernels.backends.types import Pass
from zo_kernels.ops import Table
from zo_kernels.trajectory import Kind

CALLS = {"MeZO": 4, "SparseMeZO": 4, "LeZO": 4, "MeZOSVRG": 8, "FZOO": 3}  # of the closure, in a step of two directions
FAILURES: dict[str, tuple[Any, type[BaseException], str]] = {
    "raises": (RuntimeError("out of cake"), RuntimeError, r"out of cake"),
    "interrupted": (KeyboardInterrupt(), KeyboardInterrupt, r"^$"),
    "None": (None, TypeError, r"closure: expected a scalar loss.*got NoneType"),
    "str": ("1.0", TypeError, r"closure: expected a scalar loss.*got str"),
    "bool": (True, TypeError, r"closure: expected a scalar loss.*got bool"),
    "bool tensor": (torch.tensor(True), TypeError, r"closure: expected a scalar loss.*got bool"),
    "complex tensor": (torch.tensor(1j), TypeError, r"closure: expected a scalar loss.*got complex"),
    "vector": (torch.ones(2), ValueError, r"closure: expected a scalar loss, got a tensor of shape \(2,\)"),
    "empty": (torch.ones(0), ValueError, r"closure: expected a scalar loss, got a tensor of shape \(0,\)"),
    "nan": (torch.tensor(math.nan), ValueError, r"closure: expected a finite loss, got nan"),
    "inf": (math.inf, ValueError, r"closure: expected a finite loss, got inf"),
    "-inf": (torch.tensor(-math.inf, dtype=torch.bfloat16), ValueError, r"closure: expected a finite loss, got -inf"),
}


class FailsAt(Script):
    """Returns or raises `what` at one call."""

    def __init__(self, model: nn.Module, call: int, what: Any):
        super().__init__(model)
        self.call, self.what = call, what

    def __call__(self) -> Any:
        loss = super().__call__()
        if len(self.seen) - 1 != self.call:
            return loss
        if isinstance(self.what, BaseException):
            raise self.what
        return self.what


def calls(method: str, failure: str) -> Iterator[tuple[int, int]]:
    """(steps before, failing call): every call of a step for two failures, the first and the last for the others."""
    for steps, n in (
        (1, CALLS[method]),
        (0, min(CALLS[method], 4)),
    ):  # of MeZOSVRG a step between anchors, and an anchor's
        yield from ((steps, call) for call in range(n) if failure in ("raises", "nan") or call in (0, n - 1))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_fails_leaves_restored_weights(method: str, failure: str) -> None:
    what, error, message = FAILURES[failure]
    refused = not isinstance(what, BaseException)
    for steps, call in calls(method, failure):
        model = block_mlp(depth=2)
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED, directions=2)
        run(opt, model, steps)
        before = snapshot(model)
        closure = FailsAt(model, call, what)
        with pytest.raises(error, match=message):
            take_step(opt, closure)
        assert len(closure.seen) == call + 1
        after = snapshot(model)
        if method == "MeZOSVRG":
            assert_same(before, after)
        else:
            exact = {n: t.double() for n, t in before.items()}
            assert_close(after, exact, step_in_place(magnitude(before), EPS, [0.0, 0.0]))
        assert opt.refused_steps == refused
        if refused:
            assert opt.projected_gradients == [0.0, 0.0]

        # The next step works. After a refusal it draws anew: the same directions might fail for ever.
        (again,) = run(opt, model, 1)
        if refused and call >= (moved := method == "FZOO"):  # of FZOO the first call is at θ
            assert ((again.seen[moved]["head.weight"] - closure.seen[moved]["head.weight"]).abs() > EPS / 10).any()
        assert opt.refused_steps == refused


@pytest.mark.parametrize("method", METHODS)
def test_differences_that_overflow_are_refused(method: str) -> None:
    """Finite losses whose estimate, or whose update in float32, is not finite must not reach the weights."""
    for losses in ((1e308, -1e308), (1e200, 0.0), (1e40, 0.0)):
        model = block_mlp()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"closure: "):
            take_step(opt, iter(losses).__next__)
        assert_close(snapshot(model), {n: t.double() for n, t in before.items()}, step_in_place(9.0, EPS, [0.0]))
        assert opt.refused_steps == 1


@pytest.mark.parametrize("interrupted", range(7))
@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_after_a_pass_finds_it_noted(
    method: str, perturb: str, interrupted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches Python when a pass returns."""
    model = block_mlp(depth=2)
    start = copy.deepcopy(model)
    opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED, perturb=perturb)
    for _ in range(2):
        take_step(opt, lambda: real_loss(model, opt.step_count))
    apply, passes = Table.apply, itertools.count()

    def interrupting(table: Table, do: Pass, *then: Any) -> None:
        apply(table, do, *then)
        if next(passes) == interrupted:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Table, "apply", interrupting)
        for _ in range(9):
            before = snapshot(model)
            take_step(opt, lambda: real_loss(model, opt.step_count))
    if opt.trajectory[-1].kind is Kind.INTERRUPTED:
        tolerance = step_in_place(magnitude(before), EPS, [0.0]) if perturb == "in_place" else 0.0
        assert_close(snapshot(model), {n: t.double() for n, t in before.items()}, tolerance)
    take_step(opt, lambda: real_loss(model, opt.step_count))
    zo.replay(start, opt.trajectory)
    assert_same(snapshot(start), snapshot(model))
