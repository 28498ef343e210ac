"""find_lr: it finds the rate of a quadratic, whose best one is known; and whatever happens, leaves no trace."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from inside import losses_stay
from models import block_mlp, real_loss
from torch import Tensor, nn

import zo_kernels as zo

CURVATURE, WEIGHTS = 4.0, 64
BEST = 1 / (CURVATURE * WEIGHTS)  # a step's factor on the loss is 1 - 2 lr h + lr² h² d on average, with random signs


class Quadratic(nn.Module):
    """Its loss is half the curvature times the squared distance from 0, and its buffer counts the calls."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WEIGHTS, generator=generator).to(dtype))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> Tensor:
        self.calls += 1
        return CURVATURE / 2 * self.weight.float().square().sum()


def find_lr(*args: Any, **options: Any) -> zo.FoundLR:
    """With few steps, which a loss without noise of its own needs."""
    return zo.find_lr(*args, **{"steps": 20, **options})


def forever(closure: Callable[[], Any]) -> Callable[[], Iterator[Any]]:
    return lambda: itertools.repeat(closure)


METHODS: dict[str, dict[str, Any]] = {
    "in place": {},
    "in the forward": {"perturb": "in_forward"},
    "one-sided": {"estimator": "one_sided"},
    "by a start far below": {"start": BEST / 2**5},
    "by a start far above": {"start": BEST * 2**9},
    "losses on a device": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_best_rate_of_a_quadratic(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses_stay(monkeypatch, method == "losses on a device")
    model = Quadratic()
    before = copy.deepcopy(model.state_dict())
    found = find_lr(model, forever(model), distribution="rademacher", **METHODS[method])
    assert found.lr == BEST and found.learned
    calls = model.calls.item()
    assert_same(model.state_dict(), before)
    rates = [each.lr for each in found.tried]
    assert rates == sorted(rates) and {BEST / 2, BEST, BEST * 2} <= set(rates)
    for each in found.tried:
        assert (each.gain is None) == (each.lr > 2 * BEST)  # there the loss grows in each step
        assert len(each.losses) == 20 if each.gain is not None else len(each.losses) <= 10
        below = [at_0 - loss for loss, at_0 in zip(each.losses, found.baseline, strict=False)][10:]
        assert each.gain is None or each.gain == pytest.approx(sum(below) / 10)
    assert calls == 0  # it is a buffer, and was put back


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(zo.FZOO, {}), (zo.MeZO, {"normalize": "rms"}), (zo.SparseMeZO, {"sparsity": 0.5}), (zo.MeZOSVRG, {})],
)
def test_other_units_and_two_closures(optimizer: Callable[..., Any], options: dict[str, Any]) -> None:
    """A run of the found rate ends lower than those with a quarter of it and four times as much."""
    model = block_mlp(depth=2, width=4)
    start, svrg = copy.deepcopy(model.state_dict()), optimizer is zo.MeZOSVRG

    def closures() -> Iterator[Any]:
        for step in itertools.count():
            one: Any = lambda step=step: real_loss(model, step % 4)  # noqa: E731
            yield (one, lambda: sum(real_loss(model, i) for i in range(4)) / 4) if svrg else one

    steps = {} if optimizer is zo.FZOO else {"steps": 20}
    found = zo.find_lr(model, closures, optimizer=optimizer, **steps, **options)
    assert_same(model.state_dict(), start)
    ends = []
    for factor in (0.25, 1.0, 4.0):
        opt = optimizer(model, lr=factor * found.lr, **options)
        for each in itertools.islice(closures(), 20):
            opt.step(*(each if svrg else (each,)))
        ends.append(sum(real_loss(model, i).item() for i in range(4)))
        model.load_state_dict(start)
    assert min(ends) == ends[1], ends
    assert found.steps == (10 if optimizer is zo.FZOO else 20) == len(found.baseline)


def test_the_price_is_counted() -> None:
    model = Quadratic()
    called = 0

    def closure() -> Tensor:
        nonlocal called
        called += 1
        return model()

    found = zo.find_lr(model, forever(closure))
    assert found.steps == 40
    assert found.forwards == called == 2 * sum(len(each.losses) for each in found.tried) + 2 * 40
    assert str(found).startswith(f"lr {found.lr:.3g}, found by {called} forwards\n")


def test_rates_see_the_same_batches_and_the_noise_is_not_taken_for_a_gain() -> None:
    """Also if the batches are drawn from the generators that everybody uses; which are put back."""
    model = Quadratic()
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    seen: list[list[float]] = []

    def closures() -> Iterator[Any]:
        seen.append([])
        while True:
            noise = 100 * (torch.rand(()).item() + random.random() + np.random.rand())
            seen[-1].append(noise)
            yield lambda noise=noise: model() + noise

    expected = torch.rand(()).item(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    found = find_lr(model, closures, distribution="rademacher")
    assert (torch.rand(()).item(), random.random(), np.random.rand()) == expected
    assert found.lr == BEST
    assert len(seen) == 1 + len(found.tried)
    assert all(batches == seen[0][: len(batches)] for batches in seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 30, 55, 100])
@pytest.mark.parametrize("options", [{}, {"perturb": "in_forward", "dtype": torch.bfloat16}])
def test_an_exception_leaves_no_trace(error: type[BaseException], call: int, options: dict[str, Any]) -> None:
    """In the run with lr = 0 and in later ones."""
    options = dict(options)
    model = Quadratic(options.pop("dtype", torch.float32))
    before, state, calls = copy.deepcopy(model.state_dict()), torch.get_rng_state(), itertools.count(1)

    def closure() -> Tensor:
        torch.rand(1)
        if next(calls) == call:
            raise error("now")
        return model()

    with pytest.raises(error, match="now"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        find_lr(model, forever(closure), **options)
    assert_same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_the_weights_are_put_back(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised when they are."""
    model = Quadratic()
    before, put_back, left = copy.deepcopy(model.state_dict()), Tensor.copy_, times

    def interrupted(target: Tensor, source: Tensor) -> Tensor:
        nonlocal left
        if left and target.shape == (WEIGHTS,) and not torch.equal(target, source):
            left -= 1
            raise KeyboardInterrupt
        return put_back(target, source)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_lr(model, forever(model))
    assert left == 0
    assert_same(model.state_dict(), before)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": [1]}, TypeError, r"model: expected a torch.nn.Module, got list"),
    "closures": ({"closures": [1]}, TypeError, r"closures: expected a function, got list"),
    "too few": ({"closures": list}, ValueError, r"closures: expected at least 20 closures, .* got 0"),
    "no closures": ({"closures": lambda: [3] * 20}, TypeError, r"closures: expected a function that returns the loss"),
    "steps": ({"steps": 9}, ValueError, r"steps: expected an integer at least 10, got 9"),
    "start": ({"start": 0.0}, ValueError, r"start: expected a finite number in \(0.0"),
    "lr": ({"lr": 1.0}, ValueError, r"lr: expected no such option of find_lr, since it is what is looked for"),
    "trajectory": ({"trajectory": "run.zo"}, ValueError, r"trajectory: expected no such option"),
    "optimizer": ({"optimizer": lambda model, lr: None}, TypeError, r"optimizer: expected it to make .* got NoneType"),
    "an option": ({"eps": -1.0}, ValueError, r"eps: "),
    "most": ({"start": 1e-9, "most": 3}, ValueError, r"most: .* among 3, but of those from 1e-09 to .* first or the l"),
    "all diverge": ({"start": 1e32, "most": 3}, ValueError, r"most: .* to 1e\+32 all diverged; change start= or most="),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    given, error, message = WRONG[what]
    model = Quadratic()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        find_lr(**{"model": model, "closures": forever(model), **given})
    assert_same(model.state_dict(), before)


def test_closures_that_make_rates_incomparable() -> None:
    model, counted = Quadratic(), itertools.count()

    def shifted(by: int) -> Tensor:
        return model() + by

    with pytest.raises(ValueError, match=r"closures: expected the same closures each time it is called, got .* and"):
        find_lr(model, lambda: forever(partial(shifted, next(counted)))())
    with pytest.raises(ValueError, match=r"closures: expected losses that depend on the trained weights, got 3"):
        find_lr(model, forever(lambda: torch.tensor(3.0)))
    with pytest.raises(ValueError, match="expected most losses to be finite"):
        find_lr(model, forever(lambda: model() * float("nan")))


def test_a_rate_that_lowers_nothing_is_said_to_be_a_guess() -> None:
    """At the minimum every step is one upwards."""
    model = Quadratic()
    model.weight.data.zero_()
    with pytest.warns(UserWarning, match="no learning rate lowered the loss within 20 steps"):
        found = find_lr(model, forever(lambda: (model() - 1) ** 2 + model().sqrt()), estimator="one_sided")
    whole = [each.lr for each in found.tried if each.gain is not None]
    assert not found.learned and found.lr == max(whole) / 4


def assert_same(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def svrg_pairs(model: nn.Module) -> Callable[[], Iterator[Any]]:
    return lambda: itertools.repeat((model, model))


def test_with_a_rate_of_0_nothing_moves_also_at_anchors() -> None:
    model = Quadratic()
    found = find_lr(model, svrg_pairs(model), optimizer=zo.MeZOSVRG, anchor_lr=BEST / 4, distribution="rademacher")
    assert max(found.baseline) == pytest.approx(min(found.baseline), rel=1e-5)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("bad", [{0}, {3, 12}], ids=str)
def test_a_batch_whose_loss_is_not_finite_is_left_out(
    bad: set[int], on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run skips it. It does not count as a sign of divergence."""
    losses_stay(monkeypatch, on_device)
    model = Quadratic()

    def closures() -> Iterator[Any]:
        for step in itertools.count():
            yield lambda step=step: model() * (float("nan") if step in bad else 1.0)

    found = find_lr(model, closures, distribution="rademacher")
    assert found.lr in (BEST / 2, BEST) and found.learned
    with pytest.raises(ValueError, match=r"closures: expected most losses to be finite .* got 20 of 20"):
        find_lr(model, forever(lambda: model() * float("inf")))


def test_weights_that_are_frozen_on_the_way_come_back() -> None:
    model = block_mlp(depth=1, width=4)
    before = copy.deepcopy(model.state_dict())

    def closures() -> Iterator[Any]:
        for step in range(20):
            model.embed.weight.requires_grad_(step < 15)
            yield lambda step=step: real_loss(model, step)

    find_lr(model, closures)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.embed.weight.requires_grad


def test_an_optimizer_of_other_weights_is_refused() -> None:
    model = block_mlp(depth=1, width=4)
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())

    def unfreezes(model: Any, lr: float) -> zo.MeZO:
        model.head.bias.requires_grad_(True)
        return zo.MeZO(model, lr=lr)

    with pytest.raises(ValueError, match=r"optimizer: expected it to train what requires grad .* got also head.bias"):
        find_lr(model, forever(partial(real_loss, model, 0)), optimizer=unfreezes)
    assert not model.head.bias.requires_grad
    elsewhere = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got also a tensor of shape \(3,\)"):
        find_lr(
            model,
            forever(partial(real_loss, model, 0)),
            optimizer=lambda model, lr: zo.MeZO([*model.parameters(), elsewhere], lr=lr),
        )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
