"""Losses that are too coarse for a difference of two are told, once; those of healthy runs never."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import graphs_here, losses_stay
from models import block_mlp, real_loss
from played import Graphs
from scripted import METHODS, assert_same, snapshot
from small_runs import SHAPE, build
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.closures import resolution
from zo_kernels.trajectory import TWO_SIDED

PERTURB = ("in_place", "in_forward")
Loss = Callable[[nn.Module, int], Any]


def said(go: Callable[[], Any]) -> list[str]:
    """The warnings of what it does."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        go()
    assert all(w.filename == __file__ for w in told)
    return [str(w.message) for w in told]


def run(loss: Loss, steps: int, method: str = "MeZO", **options: Any) -> zo.ZeroOrderOptimizer:
    model = block_mlp(**SHAPE)
    options = {"lr": 1e-4, "eps": 1e-3, **options}
    if method == "MeZOSVRG":
        options["anchor_lr"] = options["lr"]
    opt = build(method, model, **options)
    for i in range(steps):
        step(opt, lambda i=i: loss(model, i))
    return opt


def step(opt: zo.ZeroOrderOptimizer, loss: Callable[[], Any]) -> Any:
    return opt.step(loss, loss) if isinstance(opt, zo.MeZOSVRG) else opt.step(loss)


def logits(model: nn.Module, data: int, examples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(data)
    x, y = torch.randn(examples, 5, generator=generator), torch.randint(3, (examples,), generator=generator)
    return model(x), y


def accuracy(examples: int) -> Loss:
    """As a number: a count of these, divided."""

    def loss(model: nn.Module, data: int) -> float:
        out, y = logits(model, data, examples)
        return 1.0 - float((out.argmax(-1) == y).double().mean())

    return loss


ELSEWHERE = block_mlp(**SHAPE)
IN_16_BITS: dict[str, tuple[Loss, float, float]] = {  # a loss, and what it is about, and steps of it there
    "bfloat16": (lambda m, i: real_loss(m, 0).bfloat16(), 1.4, 2**-7),
    "float16": (lambda m, i: real_loss(m, 0).half(), 1.4, 2**-10),
    "bfloat16, below 1": (lambda m, i: (0.5 * real_loss(m, 0)).bfloat16(), 0.7, 2**-8),
}


@pytest.mark.parametrize("what", IN_16_BITS)
@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_in_16_bits_is_told_in_numbers(method: str, perturb: str, what: str) -> None:
    loss, about, spacing = IN_16_BITS[what]
    eps = 1e-3 if perturb == "in_place" else 2e-3
    (told,) = said(lambda: run(loss, 3, method, perturb=perturb, eps=eps))
    dtype = "torch.float16" if what == "float16" else "torch.bfloat16"
    assert f"got one of {dtype}: at " in told and "cross_entropy(logits.float(), labels)" in told
    at = float(told.split(": at ")[1].split()[0])
    assert (
        at == pytest.approx(about, rel=0.2)
        and spacing
        == 2.0 ** math.floor(math.log2(at)) * torch.finfo(torch.float16 if what == "float16" else torch.bfloat16).eps
    )
    formula, span = ("(L(θ + eps z) - L(θ)) / eps", eps) if method == "FZOO" else ("(L+ - L-) / 2 eps", 2 * eps)
    assert f"in steps of {spacing:.3g}, so g = {formula} comes in steps of {spacing / span:.3g}" in told


def test_of_a_gpu_no_value_is_read() -> None:
    told = resolution.narrow_loss_message(torch.empty((), dtype=torch.bfloat16, device="meta"), 1e-3, TWO_SIDED)
    assert "steps of 0.00391 to 0.00781 of its size" in told and "comes in steps of 3.91" in told
    assert "at 0 it comes in steps of" in resolution.narrow_loss_message(
        torch.zeros((), dtype=torch.float16), 1e-3, TWO_SIDED
    )


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("method", METHODS)
def test_strict_raises_before_anything_is_left_changed(method: str, perturb: str) -> None:
    model = block_mlp(**SHAPE)
    opt = build(method, model, eps=2**-10, perturb=perturb, strict=True)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"expected a float32 loss, got one of torch\.bfloat16"):
            step(opt, lambda: real_loss(model, 0).bfloat16())
    if perturb == "in_forward" or method == "MeZOSVRG":
        assert_same(before, snapshot(model))
    assert opt.step_count == 0
    step(opt, lambda: real_loss(model, 0))
    assert opt.step_count == 1


# Without a tensor of 16 bits to see: what the values tell. Each with the steps after which it must be known, a word of
# what is said, and eps.
COARSE: dict[str, tuple[Loss, int, str, float]] = {
    "item": (lambda m, i: real_loss(m, i).bfloat16().item(), 20, "steps of 0.00781 here", 2e-3),
    "float": (lambda m, i: real_loss(m, 0).bfloat16().float(), 20, "steps of 0.00781 here", 5e-3),
    "half": (lambda m, i: real_loss(m, i).half().item(), 20, "steps of 0.000", 1e-4),
    "mean of four": (
        lambda m, i: sum(real_loss(m, 4 * i + k).bfloat16().item() for k in range(4)) / 4,
        20,
        "steps of 0.000977 here",
        1e-3,
    ),
    "diverged": (
        lambda m, i: real_loss(m, i) + 10.0 ** min(i, 8),
        30,
        "has diverged; begin again with a smaller",
        1e-3,
    ),
    "large constant": (lambda m, i: real_loss(m, i) + 1e6, 20, "losses of 1e+06 come in steps of 0.0625", 5e-2),
    "eps too small": (lambda m, i: real_loss(m, i), 10, "steps of ", 1e-8),
    "another model": (lambda m, i: real_loss(ELSEWHERE, i), 20, "equal, bit for bit, in 20 steps", 1e-3),
    "no model": (lambda m, i: 0.0, 20, "another model or a copy", 1e-3),
    "an int": (lambda m, i: 3, 20, "now 3", 1e-3),
    "integer tensor": (lambda m, i: torch.tensor(i), 20, "an accuracy", 1e-3),
    "accuracy of few": (accuracy(4), 20, "larger batch or eps", 1e-9),
}


@pytest.mark.parametrize("what", COARSE)
def test_values_tell_what_the_type_does_not(what: str) -> None:
    loss, steps, word, eps = COARSE[what]
    assert said(lambda: run(loss, 9, eps=eps)) == []
    (told,) = said(lambda: run(loss, 3 * steps, eps=eps))
    (again,) = said(lambda: run(loss, steps, eps=eps))
    assert (
        word in told
        and again == told
        and told.startswith("closure: L+ and L- " if what != "diverged" else "closure: losses have grown")
    )


HEALTHY: dict[str, tuple[Loss, dict[str, Any]]] = {
    "float32": (real_loss, {}),
    "one batch": (lambda m, i: real_loss(m, 0), {}),
    "item": (lambda m, i: real_loss(m, i).item(), {}),
    "lr 0": (real_loss, {"lr": 0.0}),
    "directions": (real_loss, {"directions": 2}),
    "small eps": (real_loss, {"eps": 1e-5}),
    "a sum": (lambda m, i: 1e6 * real_loss(m, i), {"lr": 1e-12}),
    "accuracy": (accuracy(32), {"eps": 0.3}),
    "accuracy of 24": (accuracy(24), {"eps": 0.3}),
    "a count": (lambda m, i: int(32 * accuracy(32)(m, i)), {"eps": 0.3}),
    "a loss that comes to 0": (lambda m, i: real_loss(m, i) if i < 3 else real_loss(m, 0) * 0, {}),
    "some steps without difference": (lambda m, i: real_loss(m if i % 8 == 0 else ELSEWHERE, i), {}),
}


@pytest.mark.parametrize("what", HEALTHY)
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_healthy_losses_are_not_doubted(method: str, what: str) -> None:
    loss, options = HEALTHY[what]
    if method == "MeZOSVRG" and what == "some steps without difference":
        pytest.skip("its anchors come in other steps")
    assert said(lambda: run(loss, 45, method, strict=True, **options)) == []


def test_what_was_told_of_16_bits_is_not_told_again() -> None:
    """As steps without a difference, which follow from it."""
    (told,) = said(lambda: run(lambda m, i: real_loss(ELSEWHERE, i).bfloat16(), 30))
    assert "got one of torch.bfloat16" in told


def test_a_step_whose_values_are_round_by_chance_is_not_counted() -> None:
    def loss(model: nn.Module, data: int) -> float:
        real_loss(model, 0)
        values = [0.625, 0.5] if data == 0 else [0.7, 0.7]
        calls.append(data)
        return values[len(calls) % 2]

    calls: list[int] = []
    assert said(lambda: run(loss, 20)) == []
    (told,) = said(lambda: run(loss, 21))
    assert "equal, bit for bit, in 20 steps" in told


def test_each_closure_of_svrg_has_its_own_steps() -> None:
    """The anchors between are not what keeps it from being said; nor are steps the anchors'."""
    model = block_mlp(**SHAPE)

    def go(anchors: nn.Module, others: nn.Module, steps: int) -> None:
        opt = build("MeZOSVRG", model, lr=1e-4, anchor_every=4)
        for i in range(steps):
            opt.step(lambda i=i: real_loss(others, i), lambda i=i: real_loss(anchors, i))

    assert said(lambda: go(model, ELSEWHERE, 26)) == []
    (told,) = said(lambda: go(model, ELSEWHERE, 28))
    assert told.startswith("closure: L+ and L- were equal")
    (told,) = said(lambda: go(ELSEWHERE, model, 78))
    assert told.startswith("full_closure: L+ and L- were equal")


@pytest.mark.parametrize("method", METHODS)
def test_strict_refuses_the_step_in_which_it_is_known(method: str) -> None:
    model = block_mlp(**SHAPE)
    options = {"anchor_every": 1} if method == "MeZOSVRG" else {}
    opt = build(method, model, perturb="in_forward", strict=True, **options)

    def unheard() -> float:
        real_loss(model, 0)
        return 0.25

    for _ in range(19):
        step(opt, unheard)
    before, records = snapshot(model), opt.trajectory.steps
    for n in range(2):
        with pytest.raises(ValueError, match=r"in \d+ steps in a row.*; the step is skipped, the weights are restored"):
            step(opt, unheard)
        assert opt.refused_steps == n + 1 and opt.step_count == records + n + 1
    assert_same(before, snapshot(model))
    step(opt, lambda: real_loss(model, 0))
    assert opt.refused_steps == 2
    start = block_mlp(**SHAPE)
    zo.replay(start, opt.trajectory)
    assert_same(snapshot(start), snapshot(model))


@pytest.mark.parametrize("strict", [False, True])
def test_losses_on_a_device_are_looked_at_when_they_are_there(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    losses_stay(monkeypatch)
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model, strict=strict)
    step(opt, lambda: real_loss(ELSEWHERE, 0) * math.nan)  # refused on the device
    for i in range(20):
        step(opt, lambda i=i: real_loss(ELSEWHERE, i))
    before = snapshot(model)
    if strict:
        with pytest.raises(ValueError, match="in 20 steps in a row"):
            step(opt, lambda: real_loss(model, 0))
        assert_same(before, snapshot(model))
        assert opt.step_count == 21
        step(opt, lambda: real_loss(model, 0))
    else:
        (told,) = said(lambda: step(opt, lambda: real_loss(ELSEWHERE, 20)))
        assert "in 20 steps in a row" in told
        assert said(lambda: [step(opt, lambda: real_loss(ELSEWHERE, 20)) for _ in range(30)]) == []


def test_steps_of_a_graph_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    losses_stay(monkeypatch)
    model = block_mlp(**SHAPE)
    graphs_here(monkeypatch, Graphs(model).captured)
    opt = build("MeZO", model)
    graph = opt.graphed(lambda: real_loss(ELSEWHERE, 0), warmup=2)
    (told,) = said(lambda: [graph() for _ in range(22)])
    assert "were equal, bit for bit, in 20 steps" in told


def test_copies_go_on_counting() -> None:
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model)
    for _ in range(15):
        step(opt, lambda: 0.3)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        (told,) = said(lambda copied=copied: [step(copied, lambda: 0.3) for _ in range(10)])
        assert "in 20 steps" in told
