"""Perturbation in the forward, however modules use their weights, and whatever is around a step."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import pytest
import torch
from forward_runs import DTYPES, build, nothing_left_behind
from models import block_mlp, real_loss
from outright import bits, losses_outright, moved
from scripted import (
    EPS,
    METHODS,
    SEED,
    assert_same,
    same_bits,
    snapshot,
    take_step,
)
from shapes import SHAPES, Peeks, Shape, autocast
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import direction_seeds

# Of PyTorch, on what is in use here but none of our business.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def made(shape: Shape) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return shape.build()


@pytest.mark.parametrize("name", SHAPES)
def test_losses_are_those_of_weights_perturbed_outright(name: str) -> None:
    if "ModelOutput" in name:
        pytest.importorskip("transformers")
    shape = SHAPES[name]
    model, twin, losses = made(shape), made(shape), []

    def closure() -> Any:
        loss = shape.loss(model)
        losses.append(float(loss))
        return loss

    with shape.step_within(), torch.no_grad():
        clean = float(shape.loss(made(shape)))
    opt = build("MeZO", model, directions=2)
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    for step in range(3):
        losses.clear()
        with shape.step_within():
            opt.step(closure)
            expected = losses_outright(twin, lambda: shape.loss(twin), seed=SEED, step=step, eps=EPS, directions=2)
        once = [loss for loss, _ in groupby(losses)]  # twice, if something was drawn: see `randomness.Draws`
        assert once[shape.again * (step == 0) :] == expected
        assert len({clean, *expected}) == 5
        assert_same(before, snapshot(model))
        assert addresses == [p.data_ptr() for p in model.parameters()]
        assert nothing_left_behind()
        if not shape.again:
            assert all(map(torch.equal, model.buffers(), twin.buffers()))
    with shape.step_within(), torch.no_grad():
        assert float(shape.loss(model)) == clean


def test_hooks_run_and_see_perturbed_weights_before_a_module() -> None:
    """Forward hooks run, too, when the module is at θ again."""
    model, seen = block_mlp(depth=1), []
    up, name = model.blocks[0].up, "blocks.0.up.weight"
    up.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()))
    up.register_forward_hook(lambda m, args, output: seen.append(bits(m.weight)))
    build("MeZO", model).step(lambda: real_loss(model, 0))
    theta = snapshot(model)
    (seed,) = direction_seeds(SEED, 0, 1)
    for i, signed in enumerate((EPS, -EPS)):
        assert same_bits(seen[2 * i], moved(model, theta, {seed: signed})[name])
        assert seen[2 * i + 1] == bits(theta[name])


@pytest.mark.parametrize("in_inference", [False, True])
def test_models_made_in_inference_mode(in_inference: bool) -> None:
    """Their parameters are tensors of another kind."""
    with torch.inference_mode():
        model = block_mlp()
    losses = []

    def closure() -> Tensor:
        losses.append(real_loss(model, 0))
        return losses[-1]

    before = snapshot(model)
    with torch.inference_mode(in_inference):
        build("MeZO", model).step(closure)
    assert all(p.is_inference() for p in model.parameters())
    assert_same(before, snapshot(model))
    twin = block_mlp()
    assert losses == losses_outright(twin, lambda: real_loss(twin, 0), seed=SEED, step=0, eps=EPS)


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_around_steps_is_as_within_the_closure(method: str, perturb: str) -> None:
    """What autocast has cast and kept is used for no other weights."""
    results = []
    for around, inside in ((autocast, nullcontext), (nullcontext, autocast)):
        model, losses = block_mlp(), []
        opt = build(method, model, lr=0.01, perturb=perturb)

        def closure(model: nn.Module = model, inside: Any = inside, losses: list[float] = losses) -> Tensor:
            with inside():
                loss = real_loss(model, 0)
            losses.append(loss.item())
            return loss

        with around():
            for _ in range(4):
                take_step(opt, closure)
            closure()
        assert len(set(losses)) == len(losses)
        results.append(losses)
    assert results[0] == results[1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_bit_for_bit(method: str, dtype: torch.dtype, how: str) -> None:
    """Steps of a copy find weights that are read elsewhere by themselves."""
    torch.manual_seed(0)
    model = Peeks(depth=1).to(dtype)
    opt = build(method, model, lr=0.01, sparsity=0.5, directions=2)

    def go_on(opt: zo.ZeroOrderOptimizer, model: nn.Module, steps: range) -> list[float]:
        return [take_step(opt, lambda i=i: real_loss(model, i), lambda: real_loss(model, 100)).item() for i in steps]

    go_on(opt, model, range(3))
    pair = (opt, model)
    other_opt, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = snapshot(model)
    ahead = go_on(other_opt, other, range(3, 6))
    assert_same(before, snapshot(model))
    assert go_on(opt, model, range(3, 6)) == ahead
    assert_same(snapshot(model), snapshot(other))
    assert nothing_left_behind()
