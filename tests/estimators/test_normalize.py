"""Steps that are divided by the size of g: where it is 0, is not finite, or is of another run."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from inside import losses_stay
from models import block_mlp, real_loss
from scripted import EPS, LR, SEED, assert_same, snapshot

import zo_kernels as zo
from zo_kernels.estimators.normalize import Normalizer
from zo_kernels.ops import Table
from zo_kernels.weights.rows import total


def script(*losses: float) -> Any:
    values = iter(losses)
    return lambda: torch.tensor(next(values), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13])
def test_a_sum_has_the_same_bits_on_host_and_device(n: int) -> None:
    values = (torch.arange(n, dtype=torch.float64) * 0.7).exp()
    assert total(values.tolist()) == total(values).item() == pytest.approx(values.sum().item())


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_losses_that_do_not_differ_move_nothing(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    losses_stay(monkeypatch, on_device)
    for options in ({}, {"normalize": zo.RMS(0.5, 0.0)}):
        model = block_mlp(depth=2)
        before = snapshot(model)
        own = {} if options else {"directions": 3, "estimator": "one_sided", "normalize": "std"}
        opt = zo.MeZO(model, lr=LR, eps=2.0**-6, distribution="rademacher", perturb="in_forward", **own, **options)
        opt.step(lambda model=model: real_loss(model, 0) * 0.0 + 1.0)
        assert_same(snapshot(model), before)
        assert opt.projected_gradients == [0.0] * opt.directions and opt.refused_steps == 0


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_losses_that_do_not_tell_directions_apart_move_nothing(
    n: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But are far from that at θ. Nothing is divided by the rounding of their mean, which is not theirs."""
    losses_stay(monkeypatch, on_device)
    for each in (lambda k: 0.6, lambda k: 0.6 + 1e-6 * k, lambda k: 0.6 + 0.01 * k):
        model = block_mlp(depth=2)
        before = snapshot(model)
        opt = zo.FZOO(model, lr=LR, directions=n, perturb="in_forward")
        losses = iter([0.5, *map(each, range(n))])
        opt.step(lambda model=model, losses=losses: real_loss(model, 0).double() * 0.0 + next(losses))
        moved = max((t - before[name]).abs().max().item() for name, t in snapshot(model).items())
        assert moved == 0.0 if each(1) < 0.601 else 0.0 < moved < 50 * LR
        assert opt.refused_steps == 0


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_the_running_mean_skips_what_the_step_skips(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state, the steps that follow, and a replay."""
    losses_stay(monkeypatch, on_device)
    model = block_mlp(depth=2)
    start = copy.deepcopy(model)
    opt = zo.MeZO(model, lr=LR, eps=EPS, seed=SEED, normalize=zo.RMS(beta=0.75, delta=0.0))
    opt.step(script(1 + 2 * EPS, 1.0))  # g = 1: v = 1/4, w = 1/4, a step of lr
    kept = [opt.state_dict()["zo"]["rms"]]
    for bad in (math.nan, 1e300):
        try:
            opt.step(script(bad, 1.0))
        except ValueError:
            assert not on_device
        kept.append(opt.state_dict()["zo"]["rms"])
    assert opt.refused_steps == 2
    assert kept[0] == pytest.approx([0.75, 0.0, 0.25, 0.25]) and kept[1] == kept[2] == kept[0]
    opt.step(script(1 + 6 * EPS, 1.0))  # g = 3: v = 3/16 + 9/4
    assert opt.state_dict()["zo"]["rms"] == pytest.approx([0.75, 0.0, 3 / 16 + 9 / 4, 7 / 16])
    zo.replay(start, opt.trajectory)
    assert_same(snapshot(start), snapshot(model))


def test_a_normalized_step_does_not_depend_on_the_scale_of_the_loss() -> None:
    """By a power of two, no bit does."""
    for options in ({"normalize": zo.RMS(0.5, 0.0)}, {"normalize": "std", "directions": 4, "estimator": "one_sided"}):
        ends = []
        for scale in (1.0, 2.0**20):
            model = block_mlp(depth=2)
            opt = zo.MeZO(model, lr=LR, eps=EPS, seed=SEED, **options)
            for i in range(4):
                opt.step(lambda i=i, model=model, scale=scale: scale * real_loss(model, i).double())
            ends.append(snapshot(model))
        assert_same(*ends)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_normalized_update_that_goes_too_far_is_refused(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By lr g / D, not by lr g: l_0 far from the others."""
    losses_stay(monkeypatch, on_device)
    for l0, refused in ((1.0, False), (500.0, True)):
        model = block_mlp(depth=2, dtype=torch.float16)
        before = snapshot(model)
        opt = zo.FZOO(model, lr=4.0, eps=2.0**-6, directions=2, perturb="in_forward")
        zero = lambda model=model: model(torch.ones(1, 5, dtype=torch.float16)).float().sum() * 0.0  # noqa: E731
        values = iter([l0, 0.5, 1.5])
        try:
            opt.step(lambda zero=zero, values=values: zero().double() + next(values))
        except ValueError as error:
            assert not on_device and "lr: expected lr * |g| of at most 1024" in str(error)
        assert opt.refused_steps == refused
        assert all(torch.equal(t, before[name]) for name, t in snapshot(model).items()) == refused


def test_the_running_mean_may_change_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that were numbers and then stay on a device, and back, give the same bits."""
    ends = []
    for stays in ([False] * 6, [False, True, True, False, True, False]):
        model = block_mlp(depth=2)
        opt = zo.MeZO(model, lr=LR, eps=EPS, normalize="rms", directions=3)
        for i, stay in enumerate(stays):
            losses_stay(monkeypatch, stay)
            opt.step(lambda i=i, model=model: real_loss(model, i))
        ends.append((snapshot(model), opt.trajectory.to_bytes(), opt.state_dict()["zo"]["rms"]))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


OTHERS = {"estimator": {"estimator": "one_sided"}, "normalize": {"normalize": "rms"}}


@pytest.mark.parametrize("option", OTHERS)
def test_a_run_of_another_estimator_is_refused(option: str, tmp_path: Any) -> None:
    """By load_state_dict and by resume, which leave everything as it was."""
    model = block_mlp(depth=2)
    opt = zo.MeZO(model, lr=LR, eps=EPS, trajectory=tmp_path / "run.zo", **OTHERS[option])
    opt.step(lambda: real_loss(model, 0))
    state = opt.state_dict()
    del opt
    other = block_mlp(depth=2)
    before = snapshot(other)
    plain = zo.MeZO(other, lr=LR, eps=EPS)
    value = OTHERS[option][option]
    with pytest.raises(ValueError, match=rf"state_dict: zo.{option}: expected .* got '{value}'.*{option}='{value}'"):
        plain.load_state_dict(state)
    with pytest.raises(ValueError, match=rf"resume: expected a run of {option} .* got one of '{value}'.*{option}="):
        plain.resume(tmp_path / "run.zo")
    assert_same(snapshot(other), before)
    assert plain.step_count == 0


def test_the_numbers_of_the_running_mean_are_the_runs(tmp_path: Any) -> None:
    model, other = block_mlp(depth=2), block_mlp(depth=2)
    opt = zo.MeZO(model, lr=LR, eps=EPS, trajectory=tmp_path / "run.zo", normalize=zo.RMS(0.5, 0.25))
    for i in range(3):
        opt.step(lambda i=i: real_loss(model, i))
    expected = opt.state_dict()["zo"]["rms"]
    del opt
    again = zo.MeZO(other, lr=LR, eps=EPS, normalize="rms")
    again.resume(tmp_path / "run.zo")
    assert again.state_dict()["zo"]["rms"] == expected and expected[:2] == [0.5, 0.25]


def test_what_an_option_may_be() -> None:
    model = block_mlp(depth=2)
    for options, error, message in (
        ({"normalize": "adam"}, ValueError, "normalize: expected one of 'none', 'std', 'rms', got 'adam'"),
        ({"normalize": 2}, TypeError, "normalize: expected one of .* or a zo_kernels.RMS, got int"),
        ({"normalize": "std"}, ValueError, "directions: expected at least 2 with normalize='std'.*, got 1; take more"),
        ({"estimator": "both"}, ValueError, "estimator: expected one of 'two_sided', 'one_sided', got 'both'"),
    ):
        with pytest.raises(error, match=message):
            zo.MeZO(model, lr=LR, **options)
    with pytest.raises(ValueError, match="normalize: this method has an estimator of its own, svrg"):
        zo.MeZOSVRG(model, lr=LR, normalize="rms")
    with pytest.raises(ValueError, match="estimator: FZOO is 'one_sided', got 'two_sided'; leave it out"):
        zo.FZOO(model, lr=LR, estimator="two_sided")
    with pytest.raises(ValueError, match=r"normalize: beta: expected a finite number in \[0.0, 1.0\), got 1"):
        zo.RMS(beta=1.0)
    opt = zo.FZOO(model, lr=LR)
    assert (opt.estimator, opt.normalize, opt.directions, opt.distribution) == ("one_sided", "std", 8, "rademacher")
    with pytest.raises(AttributeError):
        opt.estimator = "two_sided"  # type: ignore[misc]
    state = opt.state_dict()
    state["zo"]["directions"] = 1
    with pytest.raises(ValueError, match="directions: expected at least 2"):
        opt.load_state_dict(state)
    assert opt.directions == 8
    opt.directions = 1
    before = snapshot(model)
    with pytest.raises(ValueError, match="directions: expected at least 2"):
        opt.step(lambda: real_loss(model, 0))
    assert_same(snapshot(model), before)
    assert Normalizer.of("none").divided([2.0])[0] == [2.0]


def test_at_theta_no_copies_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward, the loss at θ costs a forward and nothing else."""
    applied, before = [0], []
    apply = Table.apply

    def counted(self: Table, *args: Any, **kwargs: Any) -> None:
        applied[0] += 1
        apply(self, *args, **kwargs)

    monkeypatch.setattr(Table, "apply", counted)
    model = block_mlp(depth=2)
    opt = zo.FZOO(model, lr=LR, eps=EPS, directions=2, perturb="in_forward")

    def closure() -> torch.Tensor:
        start = applied[0]
        loss = real_loss(model, 0)
        before.append(applied[0] - start)
        return loss

    for _ in range(3):
        before.clear()
        opt.step(closure)
        assert before[0] == 0 and all(before[1:]) and len(before) == 3
