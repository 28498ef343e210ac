"""Loops and options that were written for other optimizers: what would mean nothing here is refused, or told once."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import block_mlp, real_loss
from scripted import METHODS, assert_same, snapshot
from small_runs import SHAPE, build, go
from torch import Tensor, nn

import zo_kernels as zo


def said(do: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        do()
    return [str(w.message) for w in told]


@pytest.mark.parametrize("call", ["step()", "step(None)", "step(closure=None)", "through a scheduler"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_a_closure_says_how(method: str, call: str) -> None:
    model = block_mlp(**SHAPE)
    opt = build(method, model)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1.0)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"^closure: expected .* got NoneType; .*opt\.step\(lambda: .*model\(inputs\)"):
        {"step(None)": lambda: opt.step(None), "step(closure=None)": lambda: opt.step(closure=None)}.get(
            call, opt.step
        )()
    assert_same(before, snapshot(model))
    assert opt.step_count == 0


KEYS: dict[str, tuple[type[zo.ZeroOrderOptimizer], str]] = {  # and what was meant
    "weightdecay": (zo.MeZO, "'weight_decay'"),
    "decay-all": (zo.MeZO, "'decay_all'"),
    "epsilon": (zo.MeZO, "'eps'"),
    "learning_rate": (zo.MeZO, ""),
    "betas": (zo.LeZO, ""),
    "sparcity": (zo.SparseMeZO, "'sparsity'"),
    "anchor_lr": (zo.MeZO, ""),
    "anchorlr": (zo.MeZOSVRG, "'anchor_lr'"),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_unknown_keys_of_a_group_are_named(key: str, later: bool) -> None:
    cls, meant = KEYS[key]
    options: dict[str, Any] = {"drop": 0.0} if cls is zo.LeZO else {}
    model = block_mlp(**SHAPE)
    first, second = {"params": [model.head.weight]}, {"params": [model.head.bias], key: 0.5}
    opt = cls([first], lr=0.1, **options)
    asked = rf"param_groups\[1\]: expected options of this optimizer \(lr, .*got {re.escape(repr(key))}" + (
        f"; did you mean {meant}?" if meant else " "
    )
    with pytest.raises(ValueError, match=asked):
        opt.add_param_group(second) if later else cls([first, second], lr=0.1, **options)
    assert len(opt.param_groups) == 1


def test_what_others_write_into_groups_stays() -> None:
    """Given, as those that PyTorch, schedulers and logs write; or written later, whatever it is."""
    model = block_mlp(**SHAPE)
    given = {"name": "all", "initial_lr": 0.2, "max_lr": 0.3, "min_lr": 0.0, "swa_lr": 0.1, "lr_scale": 0.5}
    opt = zo.MeZO([{"params": list(model.named_parameters()), **given}], lr=0.1)
    (group,) = opt.param_groups
    assert {key: group[key] for key in given} == given and "param_names" in group
    again = zo.MeZO([{**group, "params": list(model.parameters())}], lr=0.1)
    again.param_groups[0]["whatever"] = 7
    schedule = torch.optim.lr_scheduler.OneCycleLR(again, 0.2, total_steps=9, cycle_momentum=False)
    state = again.state_dict()
    again.load_state_dict(state)
    for opt in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert opt.param_groups[0]["whatever"] == 7
    go(again, model, 2)
    schedule.step()
    svrg = zo.MeZOSVRG([{"params": list(model.parameters()), "anchor_lr": 0.5}], lr=0.1)
    assert zo.MeZOSVRG(svrg.param_groups, lr=0.1).param_groups[0]["anchor_lr"] == 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_gradients_that_nobody_reads_are_told_once(method: str, perturb: str) -> None:
    model = block_mlp(**SHAPE)
    opt = build(method, model, perturb=perturb)
    assert said(lambda: go(opt, model, 9)) == []
    real_loss(model, 0).backward()
    (told,) = said(lambda: go(opt, model, 3))
    assert "it has a .grad, which this optimizer does not read" in told and "automatic_optimization" in told
    strict = build(method, model, perturb=perturb, strict=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has a \.grad"):
        go(strict, model, 1)
    assert_same(before, snapshot(model))
    strict.zero_grad()
    assert said(lambda: go(strict, model, 3)) == []


@pytest.mark.parametrize("which", ["head.bias", "blocks.0.up.weight"])
def test_of_one_weight_they_are_found_in_as_many_steps(which: str) -> None:
    """Not only in those that look at all of them."""
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model)
    go(opt, model, 17)
    weight = dict(model.named_parameters())[which]
    weight.grad = torch.zeros_like(weight)
    (told,) = said(lambda: go(opt, model, len(list(model.parameters()))))
    (first,) = said(lambda: go(build("MeZO", model), model, 1))
    assert first == told and told.startswith(f"{which}: it has a .grad")


def test_lightnings_automatic_optimization_is_told() -> None:
    """Its closure computes gradients; those of micro-batches without a step are computed, too, and lost."""
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model, perturb="in_place")

    @torch.enable_grad()
    def closure(data: int) -> Tensor:
        loss = real_loss(model, data)
        opt.zero_grad()
        loss.backward()
        return loss.detach()

    def epoch() -> None:
        for batch in range(4):
            if batch % 2:
                opt.step(lambda batch=batch: closure(batch))
            else:
                closure(batch)

    (told,) = said(epoch)
    assert "in Lightning, set automatic_optimization to False" in told


def test_frozen_weights_may_have_gradients() -> None:
    """Of another optimizer, in a run of both."""
    model: nn.Module = block_mlp(**SHAPE)
    for p in model.head.parameters():
        p.requires_grad_(False)
    opt = build("MeZO", model, strict=True)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    assert said(lambda: go(opt, model, 3)) == []
