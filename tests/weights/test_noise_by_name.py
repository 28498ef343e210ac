"""Noise goes by name: not by order, by wrapper, by process or by what else is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import BlockMLP, Holder, block_mlp, grown
from scripted import (
    EPS,
    LR,
    SEED,
    Noise,
    Script,
    assert_close,
    assert_same,
    magnitude,
    run,
    script,
    snapshot,
)
from tolerances import step_in_place
from torch import nn

import zo_kernels as zo
from zo_kernels import names
from zo_kernels.spec import direction_seed


class Wrapper(nn.Module):
    """What torch.compile, FSDP and data parallelism do to names."""

    def __init__(self, model: nn.Module, under: str):
        super().__init__()
        self.add_module(under, model)


def reordered(model: BlockMLP) -> nn.Module:
    other = nn.Module()
    for name in ("head", "norm", "blocks", "embed"):
        other.add_module(name, getattr(model, name))
    return other


def frozen(model: BlockMLP) -> nn.Module:
    model.blocks[1].up.weight.requires_grad_(False)
    model.embed.requires_grad_(False)
    return model


def in_groups(model: BlockMLP) -> list[dict[str, Any]]:
    named = list(model.named_parameters())[::-1]
    return [{"params": named[:5]}, {"params": named[5:], "lr": LR}]


VARIANTS: dict[str, Callable[[BlockMLP], Any]] = {
    "frozen": frozen,
    "reordered": reordered,
    "with more parameters": grown,
    "compiled": lambda m: Wrapper(m, "_orig_mod"),
    "data parallel": lambda m: Wrapper(m, "module"),
    "compiled and data parallel": lambda m: Wrapper(Wrapper(m, "_orig_mod"), "module"),
    "sharded and checkpointed": lambda m: Wrapper(Wrapper(m, "_checkpoint_wrapped_module"), "_fsdp_wrapped_module"),
    "as named parameters": lambda m: m.named_parameters(),
    "as groups, backwards": in_groups,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_goes_by_name(variant: str) -> None:
    plain, varied = block_mlp(), block_mlp()
    given = VARIANTS[variant](varied)
    for model, params in ((plain, plain), (varied, given)):
        run(zo.MeZO(params, lr=LR, eps=EPS, seed=SEED), model, 3)
    trained = {n for n, p in varied.named_parameters() if p.requires_grad}
    assert_same(snapshot(plain), snapshot(varied), trained & set(snapshot(plain)))
    start = snapshot(block_mlp())
    assert_same(start, snapshot(varied), set(start) - trained)
    assert not any(torch.equal(start[n], varied.get_parameter(n)) for n in trained & set(start))


def test_equal_tensors_get_unequal_noise() -> None:
    model = Holder(a=torch.zeros(64), b=torch.zeros(64))
    run(zo.MeZO(model, lr=LR), model, 1)
    assert (model.a != model.b).all()


def test_groups_of_equal_names_get_unequal_noise() -> None:
    """Two models in one optimizer have the same names in different groups."""
    first, second = Holder(w=torch.zeros(64)), Holder(w=torch.zeros(64))
    groups = [{"params": list(first.named_parameters())}, {"params": list(second.named_parameters())}]
    opt = zo.MeZO(groups, lr=LR)
    opt.step(Script(first))
    assert (first.w != second.w).all()


def test_unnamed_parameters_go_by_position() -> None:
    values = [torch.randn(5), torch.randn(3, 4)]
    results = []
    for names_ in (None, ("0", "1")):
        params = [nn.Parameter(v.clone()) for v in values]
        given = params if names_ is None else list(zip(names_, params, strict=True))
        opt = zo.MeZO(given, lr=LR, seed=SEED)
        for i in range(3):
            opt.step(iter([script(2 * i), script(2 * i + 1)]).__next__)
        results.append({str(i): p for i, p in enumerate(params)})
    assert_same(*results)


def tied(first: str, second: str) -> nn.Module:
    model = nn.Module()
    for name in (first, second):
        model.add_module(name, nn.Linear(4, 4, bias=False))
    torch.manual_seed(0)
    model.get_submodule(second).weight = model.get_submodule(first).weight = nn.Parameter(torch.randn(4, 4))
    return model


def test_tied_weights_get_one_noise() -> None:
    results = []
    for order in (("embed", "head"), ("head", "embed")):
        model = tied(*order)
        before = model.embed.weight.detach().clone()
        (closure,) = run(zo.MeZO(model, lr=LR, eps=EPS, seed=SEED), model, 1)
        assert model.embed.weight is model.head.weight
        results.append({"w": model.embed.weight.detach()})
        # The smaller name decides, wherever it stands.
        z = Noise({"embed.weight": before})(direction_seed(SEED, 0, 0))["embed.weight"]
        expected = {"w": before.double() - LR * closure.gradients()[0] * z}
        assert_close(results[-1], expected, step_in_place(magnitude(results[-1]) + 1, EPS, [LR]))
    assert_same(*results)


# Found by trying "w0", "w1", ...: their BLAKE2s digests begin with the same four bytes.
COLLIDING = ("w109164", "w43091")


@pytest.mark.parametrize("order", [COLLIDING, COLLIDING[::-1]])
def test_colliding_names_get_ids_that_do_not_depend_on_order(order: tuple[str, str]) -> None:
    alone = [names.param_ids([n])[n] for n in COLLIDING]
    assert alone == [509178630, 509178630]
    ids = names.param_ids(["w0", *order, "w1"])
    assert len(set(ids.values())) == 4
    assert ids[COLLIDING[0]] == alone[0]  # the first in code-point order keeps its own
    assert ids[COLLIDING[1]] == names.param_ids([f"{COLLIDING[1]}#1"])[f"{COLLIDING[1]}#1"]

    model = Holder(**{n: torch.zeros(32) for n in order})
    run(zo.MeZO(model, lr=LR, seed=SEED), model, 1)
    z = Noise({n: torch.zeros(32) for n in COLLIDING})(direction_seed(SEED, 0, 0))
    for n, direction in z.items():
        w = model.get_parameter(n).detach().double()
        assert torch.corrcoef(torch.stack([w, direction]))[0, 1].abs() > 0.999


def test_a_frozen_namesake_keeps_its_id() -> None:
    """Freezing one of a colliding pair must not give its id to the other."""
    results = []
    for freeze in (False, True):
        model = Holder(**{n: torch.zeros(32) for n in COLLIDING})
        model.get_parameter(COLLIDING[0]).requires_grad_(not freeze)
        run(zo.MeZO(model, lr=LR, seed=SEED), model, 2)
        results.append(snapshot(model))
    assert_same(*results, only=[COLLIDING[1]])
    assert not results[1][COLLIDING[0]].any()
