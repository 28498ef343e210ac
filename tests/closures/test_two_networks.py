"""Dropout that is not the same for L+ and L-, and statistics that every evaluation changes: told once, by name."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from scripted import METHODS, assert_same, snapshot
from torch import Tensor, nn
from torch.nn import functional

import zo_kernels as zo
from zo_kernels.closures import randomness

X = torch.linspace(-1, 1, 40).view(8, 5)


class Functional(nn.Module):
    """Dropout by attributes, as transformers has them, or by numbers in the code."""

    def __init__(self, **attributes: float):
        super().__init__()
        self.line = nn.Linear(6, 6)
        self.__dict__.update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        p = getattr(self, "attention_dropout", 0.5)
        return functional.dropout(self.line(x), p, training=self.training)


class Layerdrop(nn.Module):
    """Draws in training mode, to no effect, as OPT does; or always, as wav2vec2 does."""

    def __init__(self, always: bool):
        super().__init__()
        self.line, self.always, self.layerdrop, self.dropout = nn.Linear(6, 6), always, 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        skipped = (self.training or self.always) and torch.rand([]) < self.layerdrop
        return x if skipped else functional.dropout(self.line(x), self.dropout, self.training)


def model_with(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), middle, nn.Linear(6, 3)).train()


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def made(model: nn.Module, method: str = "MeZO", **options: Any) -> zo.ZeroOrderOptimizer:
    return METHODS[method](model, **{"lr": 1e-4, "blocks": [model[0], model[2]], **options})


def take(opt: zo.ZeroOrderOptimizer, loss: Callable[[], Any]) -> Any:
    return opt.step(loss, loss) if isinstance(opt, zo.MeZOSVRG) else opt.step(loss)


def said(opt: zo.ZeroOrderOptimizer, loss: Callable[[], Any], steps: int = 4) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            take(opt, loss)
    return [str(w.message) for w in told]


DRAWING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Dropout": (lambda: nn.Dropout(0.1), "1 (Dropout)"),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.1), "1 (AlphaDropout)"),
    "RReLU": (nn.RReLU, "1 (RReLU)"),
    "in a module": (lambda: nn.Sequential(nn.Sequential(nn.Dropout1d(0.9))), "1.0.0 (Dropout1d)"),
    "of attention": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8),
        "1.self_attn (MultiheadAttention), 1.dropout (Dropout)",
    ),
    "by an attribute": (lambda: Functional(attention_dropout=0.2), "1 (Functional)"),
    "by the code": (Functional, "1 (Functional)"),
}
QUIET: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "p = 0": lambda: nn.Dropout(0.0),
    "an attribute of 0": lambda: Functional(attention_dropout=0.0),
    "evaluated": lambda: nn.Dropout(0.5).eval(),
    "draws in training, to no effect": lambda: Layerdrop(False),
    "draws, to no effect": lambda: Layerdrop(True),
    "batch statistics alone": lambda: nn.BatchNorm1d(6, track_running_stats=False),
}


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("what", DRAWING)
def test_what_draws_anew_is_named_once(what: str, perturb: str) -> None:
    make, named = DRAWING[what]
    model = model_with(make())
    opt = made(model, perturb=perturb)
    (told,) = said(opt, lambda: loss_of(model))
    assert f"closure: {named}" in told and "model.eval()" in told and "torch.manual_seed" in told
    model.train()
    assert said(opt, lambda: loss_of(model)) == []
    assert said(made(model.eval()), lambda: loss_of(model)) == []


@pytest.mark.parametrize("what", QUIET)
def test_what_does_not_is_not(what: str) -> None:
    middle = QUIET[what]()
    training = middle.training
    model = model_with(middle)
    middle.train(training)
    assert said(made(model, strict=True), lambda: loss_of(model), 9) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_set_in_the_closure_is_right(method: str) -> None:
    model = model_with(nn.Dropout(0.5))
    opt = made(model, method, strict=True)

    def by_seed() -> Tensor:
        torch.manual_seed(opt.step_count)
        return loss_of(model)

    def by_fork() -> Tensor:
        with torch.random.fork_rng():
            return by_seed()

    assert said(opt, by_seed) == [] == said(opt, by_fork)
    with pytest.raises(ValueError, match=r"1 \(Dropout\) in training mode"):  # the ninth step looks again
        take(opt, lambda: loss_of(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_a_mode_that_changes_is_noticed_in_that_step(method: str, perturb: str) -> None:
    """As where an evaluation ends with `model.train()`: not only when all modules are looked at again."""
    model = model_with(nn.Dropout(0.5)).eval()
    opt = made(model, method, perturb=perturb, strict=True)
    for _ in range(11):
        take(opt, lambda: loss_of(model))
    model.train()
    before, steps = snapshot(model), opt.step_count
    for _ in range(2):
        with pytest.raises(ValueError, match=r"closure: 1 \(Dropout\) in training mode"):
            take(opt, lambda: loss_of(model))
    if perturb == "in_forward":
        assert_same(before, snapshot(model))
    assert opt.step_count == steps
    model.eval()
    take(opt, lambda: loss_of(model))


@pytest.mark.parametrize("strict", [False, True])
def test_running_statistics_are_named(strict: bool) -> None:
    model = model_with(nn.BatchNorm1d(6))
    opt = made(model, strict=strict, perturb="in_forward" if strict else "in_place")
    if strict:
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) in training mode: running statistics"):
            take(opt, lambda: loss_of(model))
        assert_same(before, snapshot(model))
        model[1].eval()
        assert said(opt, lambda: loss_of(model)) == []
    else:
        (told,) = said(opt, lambda: loss_of(model))
        assert "1 (BatchNorm1d) in training mode: running statistics" in told


@pytest.mark.parametrize("middle", [nn.Dropout(0.5), nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=0.0)])
def test_modes_are_those_within_the_closure(middle: nn.Module) -> None:
    """Not those around it, which a closure may change, and change back."""

    def in_mode(training: bool) -> Tensor:
        before = model.training
        loss = loss_of(model.train(training))
        model.train(before)
        return loss

    model = model_with(middle)
    assert said(made(model), lambda: in_mode(False)) == []
    model.eval()
    idle = isinstance(middle, nn.BatchNorm1d) and middle.momentum == 0.0
    told = said(made(model), lambda: loss_of(model.train()))
    assert [t.split("in training mode: ")[1][:5] for t in told] == ([] if idle else [WORDS[type(middle)]])


WORDS = {nn.Dropout: "other", nn.BatchNorm1d: "runni"}


def drawn_by_torch() -> float:
    return float(torch.rand([]))


def drawn_by_numpy() -> float:
    return float(numpy.random.rand())


@pytest.mark.parametrize("draw", [drawn_by_torch, random.random, drawn_by_numpy], ids=["torch", "python", "numpy"])
def test_a_batch_or_noise_that_is_drawn_in_the_closure(draw: Callable[[], float]) -> None:
    """It is called once more to know; what is drawn to no effect costs one call, and is not told."""
    model = model_with(nn.Tanh()).eval()
    (told,) = said(made(model), lambda: loss_of(model) * (1 + draw()), 5)
    assert told.startswith("closure: it returned ") and "draw the batch before the step" in told
    strict = made(model, strict=True, perturb="in_forward")
    before = snapshot(model)
    with pytest.raises(ValueError, match="and drew random numbers"):
        take(strict, lambda: loss_of(model) * (1 + draw()))
    assert_same(before, snapshot(model))
    calls: list[float] = []
    assert said(made(model), lambda: [calls.append(draw()), loss_of(model)][1], 5) == []
    assert len(calls) == 2 * 5 + 4  # once more in the steps 0, 1, 2 and 4


def test_backward_in_the_closure() -> None:
    model = model_with(nn.Tanh()).eval()
    opt = made(model)

    def closure() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"it calls backward\(\), .* leave zero_grad\(\) and backward\(\) away"):
        opt.step(closure)
    opt.step(lambda: loss_of(model))


def test_all_modules_are_gone_through_now_and_then_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    find = randomness.draws_in_training
    monkeypatch.setattr(randomness, "draws_in_training", lambda m: looks.append(opt.step_count) or find(m))
    model = model_with(nn.Dropout(0.5)).eval()
    opt = made(model)
    assert said(opt, lambda: loss_of(model), 20) == [] and looks == [0, 1, 2, 4, 8, 16]


def test_bare_parameters_tell_that_something_was_drawn() -> None:
    model = model_with(nn.Dropout(0.5))
    (told,) = said(zo.MeZO(model.parameters(), lr=1e-4), lambda: loss_of(model))
    assert "drew random numbers" in told
