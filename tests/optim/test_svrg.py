"""MeZO-SVRG: anchors, shared and separate directions, their variance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import losses_stay
from models import Holder, block_mlp
from scripted import (
    ANCHOR_SLOT,
    EPS,
    LR,
    SEED,
    SEPARATE_SLOT,
    Reference,
    Script,
    assert_close,
    assert_same,
    block_names,
    clean_masks,
    is_exempt,
    magnitude,
    percentile,
    run,
    same_bits,
    snapshot,
    untouched_blocks,
)
from tolerances import SHARED_DIRECTION_FACTOR, step_in_place
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.spec import direction_seed

SVRG: dict[str, dict[str, Any]] = {
    "every step": {"anchor_every": 1},
    "every second": {"anchor_every": 2},
    "every fifth": {"anchor_every": 5},
    "separate directions": {"anchor_every": 3, "shared_direction": False},
    "2 directions, weight decay": {"anchor_every": 4, "directions": 2, "weight_decay": 0.5},
    "2 directions, signs": {"anchor_every": 3, "directions": 2, "distribution": "rademacher"},
    "sparse, layers dropped, separate": {
        "anchor_every": 3,
        "sparsity": 0.4,
        "drop": 0.5,
        "shared_direction": False,
        "weight_decay": 0.2,
    },
}


@pytest.mark.parametrize("spec", SVRG)
def test_svrg_is_the_published_recursion(spec: str, passes: list[set[str]]) -> None:
    options, anchor_lr = SVRG[spec], 0.07
    q, n = options["anchor_every"], options.get("directions", 1)
    wd, shared = options.get("weight_decay", 0.0), options.get("shared_direction", True)
    model = block_mlp()
    opt = zo.MeZOSVRG(model, lr=LR, anchor_lr=anchor_lr, eps=EPS, seed=SEED, **options)
    start = snapshot(model)
    reference = Reference(start, exempt=is_exempt(model), distribution=options.get("distribution", "normal"))
    h = {name: percentile(t, options["sparsity"]) for name, t in start.items()} if "sparsity" in options else {}

    for step in range(2 * q + 2):
        mini, full = Script(model, 1000 * step), Script(model, 1000 * step + 500)
        before = snapshot(model)
        passes.clear()
        opt.step(mini, full)
        after = snapshot(model)
        seeds = [direction_seed(SEED, step, k) for k in range(n)]

        if step % q == 0:
            assert (len(mini.seen), len(full.seen), len(passes)) == (0, 2 * n, 2 * n + 1)
            anchor, theta = before, before  # law 5: from now on, until the next
            masks = clean_masks(anchor, h)
            dropped = untouched_blocks(model, before, full.seen[0], masks)
            assert len(dropped) == round(options.get("drop", 0.0) * len(model.blocks))
            untouched = set().union(*(block_names(model)[i] for i in dropped))
            anchor_seeds = [direction_seed(SEED, step, ANCHOR_SLOT + k) for k in range(n)]
            full_gradient = dict(zip(anchor_seeds, [g / n for g in full.gradients()], strict=True))
            probes = [(full.seen, anchor, anchor_seeds)]
            estimate, rate, n_updates = dict(full_gradient), anchor_lr, n
        else:
            assert (len(mini.seen), len(full.seen), len(passes)) == (4 * n, 0, 4 * n + 1)
            there_seeds = seeds if shared else [direction_seed(SEED, step, SEPARATE_SLOT + k) for k in range(n)]
            probes = [(mini.seen[: 2 * n], theta, seeds), (mini.seen[2 * n :], anchor, there_seeds)]
            estimate, rate = dict(full_gradient), LR
            for s, g in zip(seeds, mini.gradients(n=n), strict=True):
                estimate[s] = estimate.get(s, 0.0) + g / n
            for s, g in zip(there_seeds, mini.gradients(first=2 * n), strict=True):
                estimate[s] = estimate.get(s, 0.0) - g / n
            n_updates += 2 * n

        # Weights are rewritten from the anchor, along all directions since: no coefficient exceeds 1 here.
        tolerance = step_in_place(magnitude(before, after), EPS, [1.0] * n_updates)
        for seen, base, along in probes:
            signed = [(s, e) for s in along for e in (EPS, -EPS)]
            for w, (s, e) in zip(seen, signed, strict=True):
                assert_close(w, reference.move(base, {s: e}, masks, untouched), tolerance)
        minus = {s: -rate * g for s, g in estimate.items()}
        theta = reference.move(theta, minus, masks, untouched, 1 - rate * wd)
        assert_close(after, theta, tolerance)

        for name, p in model.named_parameters():
            assert same_bits(opt.state[p]["anchor"], anchor[name])
            assert opt.state[p]["anchor"].data_ptr() != p.data_ptr()
            keep = torch.ones_like(masks[name]) if name in untouched else ~masks[name]
            assert same_bits(after[name][keep], anchor[name][keep])


def least_squares(d: int = 20, n: int = 64, batch: int = 8) -> tuple[Holder, Callable, Callable]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(d, generator=generator, dtype=torch.float64) + torch.randn(n, generator=generator)
    model = Holder(w=torch.zeros(d))

    def loss(rows: Tensor | slice) -> float:
        return (0.5 * (x[rows] @ model.w.double() - y[rows]) ** 2).mean().item()

    def minibatch(i: int) -> float:
        return loss(torch.randperm(n, generator=torch.Generator().manual_seed(i))[:batch])

    return model, minibatch, lambda: loss(slice(None))


def test_anchors_take_twice_the_rate_of_their_group_unless_told() -> None:
    """Also while a scheduler changes it, and in a copy that loads the state."""

    def make(model: nn.Module, **more: float) -> zo.MeZOSVRG:
        weights = list(model.parameters())
        groups = [{"params": weights[:3]}, {"params": weights[3:], "lr": 3 * LR}]
        return zo.MeZOSVRG(groups, lr=LR, anchor_every=2, eps=EPS, seed=SEED, **more)

    ends = []
    for told in (True, False):
        model = block_mlp()
        opt = make(model, **({"anchor_lr": 0.5} if told else {}))
        halved = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
        for step in range(5):
            if told:
                for group in opt.param_groups:
                    group["anchor_lr"] = 2 * group["lr"]
            elif step == 2:
                state, opt = opt.state_dict(), make(model)
                opt.load_state_dict(state)
                halved.optimizer = opt
            run(opt, model, 1, first=step)
            halved.step()
        ends.append(snapshot(model))
    assert_same(*ends)


def difference_of_estimates(shared: bool, draw: int) -> Tensor:
    """estimate(I, θ) - estimate(I, θ̄) of one step, for θ and θ̄ that are the same in all draws."""
    model, minibatch, full = least_squares()
    anchor, anchor_lr = model.w.detach().double(), 0.03
    opt = zo.MeZOSVRG(model, lr=1.0, anchor_lr=anchor_lr, seed=SEED, shared_direction=shared)
    opt.step(full, full)
    theta = model.w.detach().double()
    opt.seed = draw
    opt.step(lambda: minibatch(draw), full)
    full_gradient = (anchor - theta) / anchor_lr
    return (theta - model.w.detach().double()) - full_gradient


def test_an_anchors_rate_is_that_of_the_moment_when_its_step_begins() -> None:
    """As every other rate: what a closure sets counts from the next step on."""
    ends = []
    for sets in (False, True):
        model = Holder(w=torch.ones(40))
        opt = zo.MeZOSVRG(model, lr=LR, anchor_lr=0.1, eps=EPS, seed=SEED)

        def closure(model: Holder = model, opt: zo.MeZOSVRG = opt, sets: bool = sets) -> Tensor:
            opt.param_groups[0]["anchor_lr"] = -1.0 if sets else 0.1
            return model.w.square().sum()

        opt.step(closure, closure)
        ends.append(snapshot(model))
    assert_same(*ends)
    with pytest.raises(ValueError, match="anchor_lr"):
        opt.step(closure, closure)


def test_a_bad_anchor_lr_is_found_before_anything_is_prepared() -> None:
    model = Holder(w=torch.ones(40))
    opt = zo.MeZOSVRG(model, lr=LR)
    model.w.requires_grad_(False)
    opt.param_groups[0]["anchor_lr"] = -1.0
    with pytest.raises(ValueError, match="anchor_lr"):  # not that nothing is left to train
        opt.step(lambda: 0.0, lambda: 0.0)


def test_a_loaded_state_has_the_anchors_of_all_that_is_trained() -> None:
    """So torch.distributed.checkpoint finds their keys in `state_dict()`; and what cannot be trained is told now."""
    model = Holder(w=torch.ones(40))
    opt = zo.MeZOSVRG(model, lr=LR)
    state = {**opt.state_dict(), "state": {}}
    opt.load_state_dict(state)
    assert opt.state_dict()["state"][0]["anchor"].shape == (40,)
    model.v = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="the module now has v"):
        opt.load_state_dict(state)
    assert opt.state_dict()["state"][0]["anchor"].shape == (40,)


def test_a_shared_direction_has_the_lower_variance() -> None:
    """On least squares, a tenth of the way from anchor to solution.

    With H the Hessian of a batch and δ = θ - θ̄ the variances are about

    shared:   E |z z' H δ|^2                       = (d + 2) |H δ|^2
    separate: E |z z' ∇f(θ)|^2 + |y y' ∇f(θ̄)|^2 - ... = (d + 1) (|∇f(θ)|^2 + |∇f(θ̄)|^2) + |H δ|^2
    """
    draws = range(200)
    shared, separate = (
        torch.stack([difference_of_estimates(choice, i) for i in draws]).var(0).sum().item() for choice in (True, False)
    )
    assert shared * SHARED_DIRECTION_FACTOR < separate


ROSE = [1.0, 1.04, 1.2, float("nan"), 1.3, 1.3, 0.5, -0.9, -0.8]  # the losses at anchors, and how often it was too much
ANNEALED = [0, 0, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("deferred", [False, True], ids=["on the host", "on a device"])
def test_rates_fall_when_the_loss_at_an_anchor_rises(
    deferred: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is that of rates set by hand, record for record; a state and a trajectory bring the schedule back."""
    losses_stay(monkeypatch, deferred)

    def make(model: nn.Module, **options: Any) -> zo.MeZOSVRG:
        return zo.MeZOSVRG(model, lr=LR, anchor_lr=0.3, anchor_every=2, eps=EPS, seed=SEED, weight_decay=0.1, **options)

    def period(opt: zo.MeZOSVRG, loss: float, lr: float, anchor_lr: float) -> None:
        calls = iter((loss + EPS / 10, loss - EPS / 10, 0.3, 0.31, 0.3, 0.32))
        opt.param_groups[0].update(lr=lr, anchor_lr=anchor_lr)
        skipped = nullcontext() if loss == loss or deferred else pytest.raises(ValueError, match="finite loss")
        for _ in range(1 if loss != loss and not deferred else 2):
            with skipped:
                opt.step(*[lambda: torch.tensor(next(calls), dtype=torch.float64)] * 2)

    start, by_hand = block_mlp(depth=1), block_mlp(depth=1)
    model = copy.deepcopy(start)
    opt, other = make(model, anneal=4, trajectory=tmp_path / "run.zo"), make(by_hand)
    for i, (loss, annealed) in enumerate(zip(ROSE, ANNEALED, strict=True)):
        period(opt, loss, LR / (i + 1), 0.3)
        assert opt.annealed == annealed
        period(other, loss, LR / (i + 1) / 4**annealed, 0.3 / 4**annealed)
    assert other.annealed == 0 and other.anneal is None
    assert repr([*opt.trajectory]) == repr([*other.trajectory])  # some losses are NaN
    assert_same(snapshot(model), snapshot(by_hand))

    state = copy.deepcopy(opt.state_dict())
    (tmp_path / "copy.zo").write_bytes((tmp_path / "run.zo").read_bytes())
    loaded, resumed = copy.deepcopy(model), copy.deepcopy(start)
    from_state, from_file = make(loaded), make(resumed, anneal=4)
    from_state.load_state_dict(state)
    from_state.record_to(tmp_path / "late.zo")
    from_file.resume(tmp_path / "copy.zo")
    for one in (opt, from_state, from_file):
        assert (one.anneal, one.anneal_above, one.annealed) == (4, 1.05, 3)
        period(one, -0.8, LR, 0.3)
        period(one, -0.5, LR, 0.3)
        assert one.annealed == 4 and [r.rates for r in one.trajectory[-2:]] == [(0.3 / 256,), (LR / 256,)]
    assert_same(snapshot(model), snapshot(loaded))
    assert_same(snapshot(model), snapshot(resumed))
    (tmp_path / "cut.zo").write_bytes((tmp_path / "late.zo").read_bytes())
    late = make(by_hand, anneal=2)
    with pytest.warns(
        UserWarning, match=r"the run had anneal: 4.0, anneal_above: 1.05 \(not anneal: 2.0, anneal_above: 1.05"
    ):
        late.resume(tmp_path / "cut.zo")
    assert (late.anneal, late.annealed) == (4, 4)
