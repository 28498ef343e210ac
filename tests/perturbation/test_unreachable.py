"""Reads that perturbation in the forward cannot reach are noticed, and are errors before a wrong step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forward_runs import build, nothing_left_behind
from models import block_mlp, real_loss
from outright import losses_outright
from scripted import (
    EPS,
    METHODS,
    SEED,
    assert_same,
    snapshot,
    take_step,
)
from shapes import WIDTH, InContainers, inputs, squared, weight
from torch import Tensor, nn
from torch.nn import functional

from zo_kernels.perturbation.reads.watch import Watch

# Of a weight w and another tensor x of its shape.
READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda w, x: x + w,
    "out": lambda w, x: torch.add(x, 1, out=w),
    "in place": lambda w, x: w.zero_(),
    "copy": lambda w, x: x.copy_(w[0]),
    "cast": lambda w, x: w.double(),
    "clone": lambda w, x: w.t().reshape(-1),
    "number": lambda w, x: w[1, 1].item(),
    "list": lambda w, x: torch.cat([x, w]),
    "keyword": lambda w, x: functional.linear(x, weight=w),
    "dropout": lambda w, x: torch.dropout(w, 0.5, True),
}
NO_READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "views": lambda w, x: (w.t()[0], w.view(-1), w.reshape(-1), w.flatten(), w.unbind(), w.chunk(2), w.mT, w.detach()),
    "casts to the same": lambda w, x: (w.to(w.dtype), w.float(), w.contiguous(), w.to(w.device), w.type_as(x)),
    "like": lambda w, x: (torch.zeros_like(w), torch.empty_like(w), torch.randn_like(w), w.new_ones(3)),
    "as": lambda w, x: (x.expand_as(w), x.view_as(w), x.reshape_as(w), x.double().type_as(w), x.to(w)),
    "type": lambda w, x: (torch.result_type(x, w), torch.is_same_size(x, w), w.is_floating_point()),
    "dropout of nothing": lambda w, x: torch.dropout(w, 0.5, False),
    "others": lambda w, x: x + 1,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", [*READS, *NO_READS])
def test_what_reads_a_weight(case: str, mode: Any) -> None:
    """In inference mode operations are seen whole that otherwise are taken apart."""
    w, x, found, written = nn.Parameter(torch.ones(3, 3)), torch.ones(3, 3), set(), set()
    with mode(), Watch([torch.ones(2), w.detach()], lambda address: False, found.add, written.add):
        {**READS, **NO_READS}[case](w, x)
    assert found == ({1} if case in READS else set())
    assert written == ({1} if case in ("in place", "out") else set())


class Stale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = weight(WIDTH, WIDTH)
        self.view = self.own.detach()[1:]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.own + (x @ self.view.t()).sum()


class Keeps(nn.Module):
    """A parent reads what its child has kept of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)
        self.child.register_forward_pre_hook(self.keep)

    def keep(self, child: nn.Module, _: Any) -> None:
        self.kept = child.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) @ self.kept


def penalized(model: nn.Module) -> Tensor:
    return squared(model) + sum(p.square().sum() for p in model.parameters())


def by_gradient(model: nn.Module) -> Tensor:
    """Of the gradient along the input, in a backward pass."""
    with torch.enable_grad():
        x = inputs().requires_grad_()
        return torch.autograd.grad(squared_of(model(x)), x)[0].square().sum()


def squared_of(t: Tensor) -> Tensor:
    return t.square().mean()


def by_transform(model: nn.Module) -> Tensor:
    return torch.func.grad(lambda x: squared_of(model(x)))(inputs()).sum()


def through_a_new_module(model: nn.Module) -> Tensor:
    made = nn.Linear(WIDTH, WIDTH)
    made.weight = model[0].weight
    return squared(made)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


UNREACHABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str]] = {
    "penalty": (layers, penalized, r"reads 0\.weight, 0\.bias, 2\.weight, 2\.bias where no module runs"),
    "one weight": (layers, lambda m: squared(m) * m[2].bias.max(), r"reads 2\.bias where no module runs"),
    "its number": (layers, lambda m: squared(m).item() + m[2].bias[0].item(), r"reads 2\.bias where no module runs"),
    "forward itself": (InContainers, lambda m: squared_of(m.forward(inputs())), r"reads listed\.0, .* where no module"),
    "stale view": (Stale, squared, r"a module reads own through a view that was made before its forward"),
    "kept view": (Keeps, squared, r"after the forward of their module"),
    "backward": (layers, by_gradient, r"after the forward of their module"),
    "torch.func.grad": (layers, by_transform, r"after the forward of their module"),
    "new module": (layers, through_a_new_module, r"created anew in every call reads 0\.weight"),
    "nothing ran": (layers, lambda m: 1.0, r"none of the modules with trainable parameters ran"),
    "another model ran": (layers, lambda m: squared(layers()), r"none of the modules with trainable parameters ran"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_what_cannot_be_reached_is_an_error(case: str) -> None:
    """θ is untouched, the step does not count, and a mended closure goes on as if nothing had been."""
    make, loss, message = UNREACHABLE[case]
    torch.manual_seed(0)
    model = make()
    opt, before = build("MeZO", model), snapshot(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"closure: .*{message}.*perturb='in_place'"):
            opt.step(lambda: loss(model))
        assert_same(before, snapshot(model))
        assert nothing_left_behind()
    assert opt.step_count == opt.refused_steps == 0
    if case in ("stale view", "kept view"):
        return  # it is the model that would have to be mended
    losses = []
    opt.step(lambda: losses.append(squared(model)) or losses[-1])
    assert losses[-2:] == losses_outright(model, lambda: squared(model), seed=SEED, step=0, eps=EPS)


def compiled() -> nn.Module:
    return torch.compile(block_mlp())  # nothing is compiled before it runs


def compiled_itself() -> nn.Module:
    model = block_mlp()
    model.compile()
    return model


def compiled_in_part() -> nn.Module:
    model = block_mlp()
    model.blocks[1].up = torch.compile(model.blocks[1].up)
    return model


IMPOSSIBLE = {
    "parameters": (lambda: block_mlp().parameters(), r"it needs the module"),
    "named parameters": (lambda: block_mlp().named_parameters(), r"it needs the module"),
    "groups": (lambda: [{"params": list(block_mlp().parameters())}], r"it needs the module"),
    "compiled": (compiled, r"OptimizedModule is compiled by torch\.compile"),
    "compiled itself": (compiled_itself, r"BlockMLP is compiled by torch\.compile"),
    "compiled in part": (compiled_in_part, r"blocks\.1\.up is compiled by torch\.compile"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_where_it_cannot_be(case: str) -> None:
    make, reason = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=rf"perturb: 'in_forward' cannot be: {reason}"):
        build("MeZO", make())


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_another_module_are_refused(method: str, copied: bool) -> None:
    model, extra = block_mlp(depth=1), nn.Linear(3, 3)
    opt = build(method, model)
    if copied:
        opt, model = copy.deepcopy((opt, model))
    before = snapshot(extra)
    with pytest.raises(
        ValueError, match=r"param_groups\[1\]: params: expected parameters of the module.*extra\.weight"
    ):
        opt.add_param_group({"params": [("extra.weight", extra.weight)]})
    assert len(opt.param_groups) == 1
    take_step(opt, lambda: real_loss(model, 0))
    assert_same(before, snapshot(extra))
