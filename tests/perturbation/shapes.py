"""Modules that use their weights in every way there is, and closures that run them in every way."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from models import BlockMLP, block_mlp, real_loss
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

WIDTH = 6


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Peeks(BlockMLP):
    """Reads the head's weights without calling the head, as Mamba does with its convolution's, if it `peeks`."""

    peeks = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return functional.linear(x, self.head.weight, self.head.bias) if self.peeks else x


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return x


class Parent(nn.Module):
    """Uses its own weights before, while and after a child runs on larger ones; parents may nest."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.before, self.inner, self.after = weight(WIDTH), inner, weight(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.before) * self.before + self.after.sum()


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.inner = weight(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return self.inner(self(torch.tanh(x @ self.own), depth - 1)) + x @ self.own if depth else x * self.own[0]


class Tied(nn.Module):
    """Embedding and head are one parameter; the name that counts is not the one that is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.a = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
        self.a.weight = self.z.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.z(x.argsort(1)))


class Gives(nn.Module):
    """Returns its own weight, or views of it."""

    def __init__(self, kind: Callable[[Tensor], Any]):
        super().__init__()
        self.own, self.kind = weight(WIDTH, WIDTH), kind

    def forward(self) -> Any:
        return self.kind(self.own)


class Takes(nn.Module):
    """Has two weights given, the second of which goes where the first has been, and then uses both."""

    def __init__(self, kind: Callable[[Tensor], Any], use: Callable[[Any], Tensor] = lambda given: given):
        super().__init__()
        self.first, self.second, self.use = Gives(kind), Gives(kind), use

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(), self.second()
        return x @ self.use(first) + torch.tanh(x @ self.use(second))


Pair = namedtuple("Pair", "left right")


def model_output(w: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=w.t(), hidden_states=(w, w[0]))


def sparse(w: Tensor) -> Tensor:
    """It has no memory of its own; its values are the weight's."""
    at = torch.arange(WIDTH)
    return torch.sparse_coo_tensor(torch.stack([at, at]), w[0], check_invariants=False)


def compressed(w: Tensor) -> Tensor:
    at = torch.arange(WIDTH + 1)
    return torch.sparse_csr_tensor(at, at[:-1], w[0], check_invariants=False)


class InContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([weight(WIDTH, WIDTH), weight(WIDTH)])
        self.named = nn.ParameterDict({"scale": weight(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.listed[0] + self.listed[1]) * self.named["scale"]


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Parent(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.child.forward(x)


class MakesAnew(nn.Module):
    """A module for every forward, around a weight of its own or of a child that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = nn.Linear(WIDTH, WIDTH)
        made.weight, made.bias = self.child.weight, self.child.bias
        return made(x)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(self.inner(x).sum().item())


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.fails, self.other = weight(WIDTH), Parent(Fails()), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.own
        try:
            self.fails(x)
        except ValueError as error:
            x = x + error.args[0]
        return self.other(x) + self.own * self.fails.inner.inner(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = Parent(nn.Linear(WIDTH, WIDTH)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.inner = weight(0, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.rows, self.inner(x)])


def hooked() -> nn.Module:
    """A user's hooks, which change what goes in, by the perturbed weight, and what comes out."""
    model = Parent(nn.Linear(WIDTH, WIDTH))
    model.inner.register_forward_pre_hook(lambda m, args: (args[0] * m.weight[0],))
    model.inner.register_forward_hook(lambda m, args, out: 2 * out)
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


def twice(inner: nn.Module) -> nn.Module:
    return nn.Sequential(inner, nn.Tanh(), inner)


def one_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[0].weight.requires_grad_(False)
    return model


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(7))


def squared(model: nn.Module) -> Tensor:
    return model(inputs()).square().mean()


def of_batch(model: nn.Module) -> Tensor:
    """Of three sequences, the first of which is shorter."""
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    return model(inputs(15).view(3, 5, WIDTH), src_key_padding_mask=padding).square().mean()


def attended(model: nn.Module) -> Tensor:
    x = inputs(15).view(3, 5, WIDTH)
    return model(x, x, x, need_weights=False)[0].square().mean()


def within(context: Callable[[], AbstractContextManager], loss: Callable[[nn.Module], Any]) -> Callable[..., Any]:
    def closure(model: nn.Module) -> Any:
        with context():
            return loss(model)

    return closure


def over_batches(model: nn.Module) -> float:
    return sum(real_loss(model, data).item() for data in range(3)) / 3


def by_jvp(model: nn.Module) -> Tensor:
    """Of the network's derivative along an input, as those who solve differential equations have it."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1].square().mean()


def mapped(model: nn.Module) -> Tensor:
    return torch.vmap(model)(inputs()).square().mean()


def called_functionally(model: nn.Module) -> Tensor:
    return torch.func.functional_call(model, dict(model.named_parameters()), (inputs(),)).square().mean()


autocast = partial(torch.autocast, "cpu", torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """A model, its loss, and how steps are taken.

    Attributes:
        build: the model.
        loss: of the model.
        again: how often the closure is called once more, since weights were read that were not perturbed yet.
        step_within: a context for every step.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Any] = squared
    again: int = 0
    step_within: Callable[[], AbstractContextManager] = nullcontext


linear = partial(nn.Linear, WIDTH, WIDTH)
layer = partial(nn.TransformerEncoderLayer, WIDTH, 2, 8, batch_first=True)
peeking = partial(Peeks, depth=2)

SHAPES = {
    "called several times": Shape(Repeated),
    "parents": Shape(lambda: Parent(Parent(nn.Sequential(nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH))))),
    "parents of a parent twice": Shape(lambda: twice(Parent(Parent(linear())))),
    "recursive": Shape(Recursive),
    "tied weights": Shape(Tied),
    "shared module": Shape(lambda: twice(linear())),
    "gives its weight": Shape(lambda: Takes(lambda w: w)),
    "gives a view": Shape(lambda: Takes(lambda w: w[1:].t(), lambda t: functional.pad(t, (1, 0)))),
    "gives a tuple": Shape(lambda: Takes(lambda w: (w[:3], [w[3:]]), lambda t: torch.cat([t[0], *t[1]]))),
    "gives a named tuple": Shape(lambda: Takes(lambda w: Pair(w, None), lambda t: t.left)),
    "gives a dict": Shape(lambda: Takes(lambda w: {"a": {"b": w.t()}}, lambda t: t["a"]["b"])),
    "gives a ModelOutput": Shape(lambda: Takes(model_output, lambda t: t.last_hidden_state * t.hidden_states[1])),
    "gives a sparse tensor": Shape(lambda: Takes(sparse, Tensor.to_dense)),
    "gives a compressed tensor": Shape(lambda: Takes(compressed, Tensor.to_dense)),
    "weight norm": Shape(lambda: twice(parametrizations.weight_norm(linear()))),
    "weight norm, old": Shape(lambda: twice(old_weight_norm())),
    "orthogonal": Shape(lambda: parametrizations.orthogonal(linear())),
    "parametrized by identity": Shape(lambda: parametrize.register_parametrization(linear(), "weight", nn.Identity())),
    "parametrized": Shape(lambda: parametrize.register_parametrization(linear(), "weight", Symmetric())),
    "attention": Shape(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True).eval(), attended, again=1),
    "attention, training": Shape(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), attended, again=1),
    "encoder layer": Shape(lambda: layer().eval(), of_batch, again=1),
    "encoder": Shape(lambda: nn.TransformerEncoder(layer(), 2).eval(), of_batch, again=1),
    "LSTM": Shape(lambda: nn.LSTM(WIDTH, WIDTH, 2), lambda model: model(inputs())[0].square().mean()),
    "reads a child's weights": Shape(peeking, partial(real_loss, data=0), again=1),
    "parameter containers": Shape(InContainers, again=1),
    "child.forward": Shape(Direct, again=1),
    "modules made anew": Shape(MakesAnew, again=1),
    "catches an exception": Shape(Catches),
    "checkpoint": Shape(lambda: Checkpointed(reentrant=False)),
    "checkpoint, reentrant": Shape(lambda: Checkpointed(reentrant=True)),
    "batch norm": Shape(lambda: nn.Sequential(linear(), nn.BatchNorm1d(WIDTH))),
    "hooks": Shape(hooked),
    "no elements": Shape(Empty),
    "frozen": Shape(one_frozen),
    "several batches, floats": Shape(peeking, over_batches, again=1),
    "closure in inference mode": Shape(peeking, within(torch.inference_mode, partial(real_loss, data=0)), again=1),
    "steps in inference mode": Shape(peeking, partial(real_loss, data=0), again=1, step_within=torch.inference_mode),
    "closure in autocast": Shape(peeking, within(autocast, partial(real_loss, data=0)), again=1),
    "steps in autocast": Shape(peeking, partial(real_loss, data=0), again=1, step_within=autocast),
    "closure with gradients": Shape(peeking, within(torch.enable_grad, partial(real_loss, data=0)), again=1),
    "vmap": Shape(lambda: nn.Sequential(linear(), nn.Tanh(), linear()), mapped),
    "jvp": Shape(block_mlp, by_jvp),
    "functional_call": Shape(lambda: Parent(linear()), called_functionally),
}
