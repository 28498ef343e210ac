"""Freezing, moving and adding parameters in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from statistics import stdev
from typing import Any

import pytest
import torch
from models import Holder, block_mlp
from scripted import (
    EPS,
    LR,
    METHODS,
    SEED,
    assert_same,
    run,
    same_bits,
    snapshot,
)
from torch import nn

import zo_kernels as zo
from zo_kernels.backends.types import Entry, Pass
from zo_kernels.ops import Table


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5}], ids=["dense", "sparse"])
def test_freezing_in_the_middle_of_a_run(method: str, options: dict[str, Any]) -> None:
    """A frozen parameter keeps its bits; it takes part again, from where it is, when it is unfrozen."""
    model = block_mlp()
    opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED, **options)
    p, name = model.head.weight, "head.weight"
    run(opt, model, 2)
    p.requires_grad_(False)
    frozen_at = p.detach().clone()
    for s in run(opt, model, 2, first=2):
        assert all(same_bits(seen[name], frozen_at) for seen in s.seen)
    assert same_bits(p, frozen_at)
    p.requires_grad_(True)
    (s,) = run(opt, model, 1, first=4)
    assert not same_bits(s.seen[1][name], frozen_at)
    # ... and not from where it would be if it had not been frozen: one step moves it by about LR g z and no more.
    g = opt.projected_gradients
    assert (p - frozen_at).abs().max() < 7 * LR * max(map(abs, g)) / (stdev(g) if method == "FZOO" else 1.0)


@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO"])
def test_freezing_does_not_change_the_others(method: str) -> None:
    results = []
    for freeze in (False, True):
        model = block_mlp()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        run(opt, model, 2)
        model.head.weight.requires_grad_(not freeze)
        run(opt, model, 2, first=2)
        model.head.weight.requires_grad_(True)
        run(opt, model, 1, first=4)
        results.append(snapshot(model))
    assert_same(*results, only=set(results[0]) - {"head.weight"})


@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO", "LeZO"])
def test_replaced_memory_changes_nothing(method: str) -> None:
    """p.data = a copy, before any step and between any two: the tables are built again."""
    results = []
    for replace in (False, True):
        model = block_mlp()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        held = []
        for step in range(7):
            if replace and step % 3 != 2:
                for p in model.parameters():
                    held.append(p.data)
                    p.data = p.data.clone()
            run(opt, model, 1, first=step)
        results.append(snapshot(model))
    assert_same(*results)


def loaded(model: nn.Module) -> None:
    model.load_state_dict(block_mlp(seed=1).state_dict())


def copied(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def assigned(model: nn.Module) -> None:
    for p, other in zip(model.parameters(), block_mlp(seed=1).parameters(), strict=True):
        p.data = other.data


def one_frozen(model: nn.Module) -> None:
    model.norm.weight.requires_grad_(False)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("anchor_every", [1, 5])
@pytest.mark.parametrize("change", [loaded, copied, assigned, one_frozen])
def test_svrg_goes_on_from_the_weights_it_finds(change: Callable, anchor_every: int, sparsity: float) -> None:
    """After a change from outside it takes an anchor there, or, if the weights are the same, may stay on its path."""
    ends = []
    for do in (lambda model: None, change):
        model = block_mlp()
        options = {"anchor_lr": 1e-3, "anchor_every": anchor_every, "sparsity": sparsity}
        opt = zo.MeZOSVRG(model, lr=LR, eps=EPS, seed=SEED, **options)
        run(opt, model, 3)
        do(model)
        before = snapshot(model)
        run(opt, model, 1, first=3)
        ends.append(snapshot(model))
    anchors = {n: opt.state[p]["anchor"] for n, p in model.named_parameters() if p.requires_grad}
    if change is not copied or not all(same_bits(ends[0][n], ends[1][n]) for n in ends[0]):
        assert_same(anchors, before)
        moved = torch.cat([(ends[1][n] != before[n]).flatten() for n in anchors])
        assert moved.float().mean() > 0.6 * (1 - sparsity)  # fewer weights are below the thresholds by now


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_became_smaller_at_the_same_address(method: str) -> None:
    """Elements that are no longer part of the parameter are somebody else's."""
    model = Holder(w=torch.randn(64))
    opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED, drop=0.0)
    run(opt, model, 1)
    whole = model.w.data
    model.w.data = whole[:16]
    rest, part = whole[16:].clone(), whole[:16].clone()
    run(opt, model, 2, first=1)
    assert same_bits(whole[16:], rest)
    assert not torch.equal(whole[:16], part)


def test_a_table_refuses_stale_memory() -> None:
    p = nn.Parameter(torch.ones(8))
    table = Table([Entry(p, p, 0)], ["p"])
    old = p.data
    p.data = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"memory was replaced"):
        table.apply(Pass([1], [[1.0]], [1.0]))
    assert torch.equal(old, torch.ones(8)) and torch.equal(p, torch.ones(8))


@pytest.mark.parametrize("method", METHODS)
def test_added_groups_take_part_from_the_next_step(method: str) -> None:
    results = []
    for add in (False, True):
        model, extra = block_mlp(), nn.Linear(4, 3)
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        run(opt, model, 2)
        if add:
            before = extra.weight.detach().clone()
            opt.add_param_group({"params": [("extra.weight", extra.weight)], "lr": 2 * LR})
        run(opt, model, 2, first=2)
        results.append(snapshot(model))
    assert not torch.equal(extra.weight, before)
    if method != "MeZOSVRG":  # which takes an anchor then
        assert_same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_an_added_group_that_is_frozen_changes_nothing(method: str) -> None:
    results = []
    for add in (False, True):
        model, extra = block_mlp(), nn.Linear(4, 3).requires_grad_(False)
        before = extra.weight.clone()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        run(opt, model, 2)
        if add:
            opt.add_param_group({"params": [("extra.weight", extra.weight)]})
        run(opt, model, 2, first=2)
        results.append(snapshot(model))
    assert_same(*results)
    assert same_bits(extra.weight, before)
