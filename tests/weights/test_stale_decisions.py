"""A module that changes after its optimizer was made: what follows from it is derived anew, or a step says no."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import tables_of
from models import BlockMLP, block_mlp, real_loss
from scripted import METHODS, assert_same, snapshot, take_step
from torch import nn

import zo_kernels as zo


def assigned(model: BlockMLP) -> None:
    model.load_state_dict(block_mlp(seed=1).state_dict(), assign=True)


def new_head(model: BlockMLP) -> None:
    model.head = nn.Linear(6, 3)


def no_head(model: BlockMLP) -> None:
    model.head = nn.Identity()


def new_block(model: BlockMLP) -> None:
    model.blocks[2] = copy.deepcopy(model.blocks[2])


def one_replaced(model: BlockMLP) -> None:
    model.head.bias = nn.Parameter(torch.zeros(3))


def one_more(model: BlockMLP) -> None:
    model.head.more = nn.Parameter(torch.zeros(3))


def grown(model: BlockMLP) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def an_adapter(model: BlockMLP) -> None:
    """As peft's: the layer is frozen, and what is trained is beside it."""
    layer = model.blocks[1].up
    layer.requires_grad_(False)
    model.blocks[1].up = nn.Sequential(layer, nn.Linear(12, 12))


GONE = {
    assigned: "no longer has blocks.0.down.weight, blocks.0.norm.bias, .* and 21 more",
    new_head: "no longer has head.bias, head.weight",
    no_head: "no longer has head.bias, head.weight",
    new_block: "no longer has blocks.2.down.weight",
    one_replaced: "no longer has head.bias,",
    one_more: "now has head.more,",
    grown: "now has blocks.4.down.weight",
    an_adapter: "now has blocks.1.up.1.bias, blocks.1.up.1.weight,",
}


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("method", ["LeZO", "MeZOSVRG"])
@pytest.mark.parametrize("change", GONE)
def test_parameters_that_came_or_went_are_an_error(change: Callable, method: str, perturb: str) -> None:
    """It names them, before the closure is called; a step can be taken as soon as all is as it was."""
    model = block_mlp()
    opt = METHODS[method](model, lr=1e-2, perturb=perturb)
    take_step(opt, lambda: real_loss(model, 0))
    held = copy.copy(model.__dict__["_modules"]), dict(model.blocks._modules), dict(model.blocks[1]._modules)
    parameters = {m: dict(m._parameters) for m in model.modules()}
    grads = {p: p.requires_grad for p in model.parameters()}
    change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^params: the module {GONE[change]}.*optimizer"):
        take_step(opt, lambda: pytest.fail("the closure was called"))
    assert_same(snapshot(model), before)

    model.__dict__["_modules"], model.blocks._modules, block = held
    model.blocks[1]._modules = block
    for m, own in parameters.items():
        m._parameters = own
    for p, requires in grads.items():
        p.requires_grad_(requires)
    take_step(opt, lambda: real_loss(model, 1))
    assert opt.step_count == 2


@pytest.mark.parametrize("steps", [0, 2])
def test_what_came_frozen_and_is_unfrozen_later_is_an_error(steps: int) -> None:
    model = block_mlp(depth=1)
    opt = zo.MeZO(model, lr=1e-2)
    model.more = nn.Linear(3, 3).requires_grad_(False)
    for step in range(steps):
        opt.step(lambda step=step: real_loss(model, step))
    model.more.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^params: the module now has more\.bias, more\.weight,"):
        opt.step(lambda: real_loss(model, 0))
    opt.add_param_group({"params": list(model.more.parameters())})
    for step in range(2):
        opt.step(lambda step=step: real_loss(model, step))


def test_a_module_of_torchscript() -> None:
    """It makes its tables and parameters anew whenever it is asked."""
    model = nn.Sequential(torch.jit.script(nn.Linear(5, 4)), nn.Linear(4, 3))
    opt = zo.MeZO(model, lr=1e-2, perturb="in_place")
    for _ in range(3):
        opt.step(lambda: real_loss(model, 0))
    model[1] = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"^params: the module no longer has 1\.bias, 1\.weight,"):
        opt.step(lambda: real_loss(model, 0))


def test_what_came_can_be_added() -> None:
    """By its name, as if the optimizer had been made of the module as it is now."""
    ends = []
    for late in (True, False):
        model = block_mlp()
        extra = copy.deepcopy(model.head)
        if not late:
            model.extra = extra
        opt = zo.MeZO(model, lr=1e-2)
        if late:
            model.extra = extra
            opt.add_param_group({"params": list(extra.parameters())})
        for step in range(3):
            opt.step(lambda m=model, step=step: real_loss(m, step) + m.extra.weight.square().mean())
        ends.append(snapshot(model))
        assert opt.state_dict()["zo"]["param_ids"][-2:] == [
            zo.names.param_ids([n])[n] for n in ("extra.weight", "extra.bias")
        ]
    assert_same(*ends)


def frozen(model: BlockMLP) -> None:
    model.more = nn.Bilinear(1, 1, 1, bias=False).requires_grad_(False)
    model.more.weight.zero_()


def wrapped(model: BlockMLP) -> None:
    model.head = nn.Sequential(model.head)


def a_buffer(model: BlockMLP) -> None:
    model.register_buffer("more", torch.zeros(3))


@pytest.mark.parametrize("change", [frozen, wrapped, a_buffer])
@pytest.mark.parametrize("method", METHODS)
def test_changes_of_what_is_not_trained_do_no_harm(method: str, change: Callable) -> None:
    """Noise goes by the names that parameters had, and the trajectory gives the weights."""
    model = block_mlp()
    opt = METHODS[method](model, lr=1e-2)
    for step in range(2):
        take_step(opt, lambda step=step: real_loss(model, step))
    change(model)
    take_step(opt, lambda: real_loss(model, 2))
    named = zo.names.param_ids(zo.names.of_module(model).values())
    trained = [named[name] for name, p in model.named_parameters() if p.requires_grad]
    assert (opt.state_dict()["zo"]["param_ids"] == trained) == (change is not wrapped)
    start = block_mlp()
    if change is not wrapped:  # then it is called as before
        change(start)
    zo.replay(start, opt.trajectory)
    for p, q in zip(start.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_blocks_and_normalisations_are_found_again() -> None:
    model = block_mlp(depth=3)
    opt = zo.LeZO(model, lr=1e-2, weight_decay=0.1)
    model.blocks.append(block_mlp(depth=1, seed=3).blocks[0])
    opt.add_param_group({"params": list(model.blocks[3].parameters())})
    opt.step(lambda: real_loss(model, 0))
    entry = {w.name: w for w in tables_of(opt).weights}
    assert entry["blocks.3.up.weight"].block == 3
    assert entry["blocks.3.norm.weight"].row == 3  # exempt from the second group's weight decay


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
@pytest.mark.parametrize("method", METHODS)
def test_where_to_perturb_goes_by_the_weights_as_they_are(method: str, cast: str) -> None:
    """perturb="auto", as of an optimizer made after the cast; and back again."""
    model = block_mlp(depth=2)
    opt: Any = METHODS[method](model, lr=0.0)
    take_step(opt, lambda: real_loss(model, 0))
    assert opt.perturb == "in_place"
    getattr(model, cast)()
    before = snapshot(model)
    for step in range(5):
        take_step(opt, lambda step=step: real_loss(model, step))
    assert opt.perturb == "in_forward"
    assert_same(snapshot(model), before)
    model.float()
    take_step(opt, lambda: real_loss(model, 5))
    assert opt.perturb == "in_place"


def test_16_bits_that_cannot_be_perturbed_in_the_forward_are_said() -> None:
    model = block_mlp(depth=1)
    opt = zo.MeZO(model.parameters(), lr=0.0)
    model.bfloat16()
    with pytest.warns(UserWarning, match="they drift; in the forward they would not, but it needs the module"):
        opt.step(lambda: real_loss(model, 0))
    strict = zo.MeZO(block_mlp(depth=1).parameters(), lr=0.0, strict=True)
    for p in strict.param_groups[0]["params"]:
        p.data = p.data.half()
    with pytest.raises(ValueError, match="they drift"):
        strict.step(lambda: 1.0)
