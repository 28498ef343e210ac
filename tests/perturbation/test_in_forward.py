"""Perturbation in the forward: θ is never written, every module runs on the bits that the primitive would write."""

from __future__ import annotations

import itertools
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from forward_runs import DTYPES, OPTIONS, OUTPUTS, build, nothing_left_behind, quickly
from hypothesis import given
from hypothesis import strategies as st
from inside import stored_masks_of
from models import Block, BlockMLP, block_mlp, real_loss
from outright import bits, holding, losses_outright, moved, trainable
from scripted import (
    ANCHOR_SLOT,
    EPS,
    METHODS,
    SEED,
    SEPARATE_SLOT,
    Weights,
    assert_same,
    block_names,
    clean_masks,
    is_exempt,
    snapshot,
    take_step,
)
from shapes import Parent, Takes, squared
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import blocks_to_drop, direction_seeds
from zo_kernels.perturbation.engine import Engine
from zo_kernels.perturbation.in_forward import InForwardProbes
from zo_kernels.perturbation.reads.seals import Seals


class Early(Exception):
    """The closure has what it wants."""


class EarlyExit(BaseException):
    """As Early, but as little of an Exception as an interrupt is."""


# How a call of the closure ends; the third, whether that comes out of the step.
ENDS: dict[str, tuple[str, type[BaseException], bool]] = {
    "nan": ("at the end", ValueError, True),
    "raises": ("at the end", RuntimeError, True),
    "interrupted": ("at the end", KeyboardInterrupt, True),
    "raises in a module": ("in a module", StopIteration, True),
    "interrupted in a module": ("in a module", KeyboardInterrupt, True),
    "early": ("in a module", Early, False),
    "early exit": ("in a module", EarlyExit, False),
}


class Ending:
    """A closure, one call of which ends in some way. While no module runs it finds the parameters as they were."""

    def __init__(self, model: BlockMLP, how: str, call: int):
        self.model, self.how, self.call, self.calls = model, how, call, 0
        self.where, self.error, _ = ENDS[how]
        self.expected = self.state()
        model.blocks[1].down.register_forward_pre_hook(lambda *_: self.end("in a module"))

    def state(self) -> list[Any]:
        parameters = self.model.parameters()
        with torch._C.DisableTorchFunctionSubclass():  # unnoticed: it would be called again
            return [(id(p), p.data_ptr(), p.requires_grad, p.is_leaf, bits(p), p._version) for p in parameters]

    def end(self, where: str) -> None:
        if where == self.where and self.calls == self.call + 1 and self.how != "nan":
            raise self.error()

    def __call__(self) -> float:
        self.calls += 1
        assert self.state() == self.expected
        loss = math.nan if self.how == "nan" and self.calls == self.call + 1 else 1.0
        with suppress(Early, EarlyExit):
            loss *= real_loss(self.model, 0).item()
        if self.error is not EarlyExit:  # PyTorch runs no hooks then; a module's weights come back with the step's end
            assert self.state() == self.expected
        self.end("at the end")
        return loss


@quickly(max_examples=40)
@given(
    method=st.sampled_from(list(METHODS)),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    outputs=OUTPUTS,
    how=st.sampled_from(list(ENDS)),
    call=st.integers(0, 9),
)
def test_probes_leave_no_trace(method, dtype, options, outputs, how, call) -> None:
    """With updates of nothing no bit ever changes; without an update, not even a version counter does."""
    model = block_mlp(depth=2, dtype=dtype, outputs=outputs)
    opt = build(method, model, **options)
    closure, failed = Ending(model, how, call), 0
    for _ in range(3):
        try:
            take_step(opt, closure)
        except closure.error:
            assert closure.calls == call + 1
            assert closure.state() == closure.expected
            failed += 1
        assert nothing_left_behind()
        after = closure.state()
        assert [s[:-1] for s in after] == [s[:-1] for s in closure.expected]
        closure.expected = after  # an update is a pass over θ
    assert failed == (ENDS[how][2] and closure.calls > call)
    assert opt.refused_steps == (how == "nan" and failed)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the shell has it ignored, as in the background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupt_at_any_line_leaves_no_trace(interruptible: None) -> None:
    """Ctrl-C may come in between any two lines of the engine."""
    functions = [f for f in vars(Engine).values() if callable(f)]
    functions += [f for f in vars(Seals).values() if callable(f)]
    codes = {f.__code__ for f in [*functions, InForwardProbes.evaluate]}
    model = Parent(Takes(lambda w: w))
    opt = build("MeZO", model)
    before = [(p.data_ptr(), bits(p)) for p in model.parameters()]
    left = 0

    def tracer(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code not in codes:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return tracer

    for at in itertools.count(1):
        left, outer = at, sys.gettrace()
        sys.settrace(tracer)
        try:
            opt.step(lambda: squared(model))
            break  # the step has fewer lines than that
        except KeyboardInterrupt:
            assert [(p.data_ptr(), bits(p)) for p in model.parameters()] == before
            assert nothing_left_behind() and {type(p) for p in model.parameters()} == {nn.Parameter}
        finally:
            sys.settrace(outer)
    assert at > 100


class Recorder:
    """A closure on real data that keeps, for each call, the loss and what every module's own weights were."""

    def __init__(self, model: nn.Module):
        self.model, self.seen, self.losses = model, list[Weights](), list[float]()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self.look, name))

    def look(self, prefix: str, module: nn.Module, _: Any) -> None:
        own = module.named_parameters(prefix, recurse=False)
        self.seen[-1].update({name: p.detach().clone() for name, p in own})

    def __call__(self) -> Tensor:
        self.seen.append({})
        loss = real_loss(self.model, 0)
        self.losses.append(loss.item())
        return loss


def thresholds(opt: zo.ZeroOrderOptimizer, model: nn.Module) -> dict[str, float]:
    found = zip(trainable(model), opt.state_dict()["zo"]["thresholds"], strict=True)
    return {name: h for name, h in found if h is not None}


def dropped_names(model: BlockMLP, step: int, drop: float) -> set[str]:
    dropped = blocks_to_drop(SEED, step, len(model.blocks), drop)
    return set().union(*(names for i, names in enumerate(block_names(model)) if i in dropped))


@quickly(max_examples=40)
@given(
    method=st.sampled_from(list(METHODS)),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    outputs=OUTPUTS,
    shared=st.booleans(),
)
def test_modules_see_the_specified_bits(method, dtype, options, outputs, shared) -> None:
    """In every evaluation of four steps: weights perturbed outright, hence their loss; then the update of θ, if it is
    from θ.
    """
    model, twin = (block_mlp(depth=2, dtype=dtype, outputs=outputs) for _ in range(2))
    lr = 0.01
    svrg = method == "MeZOSVRG"
    opt = build(method, model, lr=lr, **options, **({"shared_direction": shared} if svrg else {}))
    how = {"rounding": "nearest" if options["rounding"] == "nearest" else "stochastic"}
    how |= {"distribution": options["distribution"]}
    recorder, limits, exempt = Recorder(model), thresholds(opt, model), is_exempt(model)
    n, signs = opt.directions, ((EPS,) if method == "FZOO" else (EPS, -EPS))

    def decay(name: str) -> float:
        return 1.0 if exempt(name) else 1 - lr * options["weight_decay"]

    for step in range(4):
        theta = snapshot(model)
        anchoring = svrg and step % 2 == 0
        if anchoring or not svrg:
            start, masks = theta, clean_masks(theta, limits)
            untouched = dropped_names(model, step, options["drop"])
        evaluations = [(theta, direction_seeds(SEED, step, n, ANCHOR_SLOT if anchoring else 0))]
        if svrg and not anchoring:
            evaluations.append((start, direction_seeds(SEED, step, n, 0 if shared else SEPARATE_SLOT)))
        expected = [
            moved(model, source, {seed: signed}, masks=masks, untouched=untouched, **how)
            for source, seeds in evaluations
            for seed in seeds
            for signed in signs
        ]
        if method == "FZOO":
            expected.insert(0, theta)
        recorder.seen.clear()
        recorder.losses.clear()
        take_step(opt, recorder)
        assert len(recorder.seen) == len(expected)
        for got, loss, weights in zip(recorder.seen, recorder.losses, expected, strict=True):
            assert_same(weights, got)
            with holding(twin, weights), torch.no_grad():
                assert real_loss(twin, 0).item() == loss
        if anchoring or method not in ("MeZOSVRG", "FZOO"):
            update = {s: -lr * g / n for s, g in zip(evaluations[0][1], opt.projected_gradients, strict=True)}
            after = moved(model, theta, update, masks=masks, untouched=untouched, decay=decay, **how)
            assert_same(after, snapshot(model))


@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO", "LeZO"])
def test_masks_are_taken_from_clean_weights_and_not_stored(method: str) -> None:
    """In place they are stored, and the same."""
    first = {}
    for perturb in ("in_place", "in_forward"):
        model = block_mlp()
        opt = build(method, model, lr=0.01, sparsity=0.6, perturb=perturb)
        assert len(stored_masks_of(opt)) == (perturb == "in_place") * len(trainable(model))
        recorder = Recorder(model)
        for _ in range(3):
            theta = snapshot(model)
            masks = clean_masks(theta, thresholds(opt, model))
            opt.step(recorder)
            for weights in (*recorder.seen[-2:], snapshot(model)):
                changed = {name: weights[name] != t for name, t in theta.items()}
                assert not any((changed[name] & ~masks[name]).any() for name in theta)
                assert sum(changed[name].sum() for name in theta) > 0.99 * sum(masks[name].sum() for name in theta)
        first[perturb] = recorder.seen[0]
    assert_same(first["in_place"], first["in_forward"])


def test_parameters_that_the_module_has_got_since_take_part() -> None:
    model, losses = block_mlp(depth=1), []
    opt = build("MeZO", model)
    opt.step(lambda: real_loss(model, 0))
    model.blocks.append(Block(6))
    opt.add_param_group({"params": [(f"blocks.1.{n}", p) for n, p in model.blocks[1].named_parameters()]})
    opt.step(lambda: losses.append(real_loss(model, 0)) or losses[-1])
    assert losses == losses_outright(model, lambda: real_loss(model, 0), seed=SEED, step=1, eps=EPS)
