"""Updates that would make weights infinite: refused like a loss that is not finite, on the host and on a device."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from inside import graphs_here, losses_stay
from models import block_mlp
from scripted import METHODS, assert_same, snapshot, take_step
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import spec
from zo_kernels.weights.overflow import Reach

# What makes a step go too far (of a step whose |g| is about 1 / EPS), and what the error says.
EPS = 2.0**-6
NOT_NORMALIZED = [method for method in METHODS if method != "FZOO"]
TOO_FAR: dict[str, tuple[dict[str, float], str]] = {
    "lr 1e300": ({"lr": 1e300}, r"lr: expected a learning rate that float32 holds, got [12]e\+300"),
    "lr 1e308, twice of which is infinite": ({"lr": 1e308}, r"lr: expected a learning rate that float32 holds"),
    "lr 1e30": ({"lr": 1e30}, r"lr: expected lr \* \|g\| of at most (1e\+30|1024) for .*, got lr .e\+30 and \|g\| "),
    "lr 1e3": ({"lr": 1e3}, r"lr: expected lr \* \|g\| of at most 1024 for float16 weights, got lr [12]000.0 and"),
    "weight decay": (
        {"weight_decay": 1e30},
        r"weight_decay: expected lr \* weight_decay of at most 2, .*[12]e\+27",
    ),
    "both": ({"lr": 1e300, "weight_decay": 1e300}, r"lr: expected a learning rate that float32 holds, got [12]e\+300"),
}
KNOWN_AT_ONCE = {"lr 1e300", "lr 1e308, twice of which is infinite", "weight decay", "both"}  # on a device, too


def zero(model: nn.Module) -> Tensor:
    """For perturbation in the forward, which wants its modules to run."""
    return model(torch.ones(1, 5, dtype=model.head.weight.dtype)).float().sum().nan_to_num() * 0.0


def losses_of(model: nn.Module) -> Any:
    """Losses of which each pair differs by 2."""
    values = iter([1.0, -1.0] * 100)
    return lambda: zero(model) + next(values)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "method, perturb, dtype",
    [
        *((method, perturb, torch.float16) for method in NOT_NORMALIZED for perturb in ("in_place", "in_forward")),
        *((method, "in_place", torch.float32) for method in ("MeZO", "MeZOSVRG")),
    ],
    ids=str,
)
def test_a_step_that_goes_too_far_is_refused(
    method: str, perturb: str, dtype: torch.dtype, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever set the rate, before or after, and whatever step of MeZO-SVRG it is: the next one goes on."""
    losses_stay(monkeypatch, on_device)
    exact = perturb == "in_forward" or method == "MeZOSVRG"
    for name, (options, message) in TOO_FAR.items():
        if name == "lr 1e3" and dtype != torch.float16:
            continue
        model = block_mlp(depth=2, width=4, dtype=dtype)
        start = copy.deepcopy(model)
        more = {"anchor_every": 3} if method == "MeZOSVRG" else {"directions": 1 + (method == "MeZO")}
        opt = METHODS[method](model, **{"lr": 1e-3, "eps": EPS, "perturb": perturb, **options, **more})
        group = opt.param_groups[0]
        closure = losses_of(model)
        ends = []
        for step in range(7):  # of MeZO-SVRG 0 is an anchor's, 5 between anchors
            bad = step in (0, 5)
            group.update(options if bad else {"lr": 1e-3, "weight_decay": 0.0})
            before = snapshot(model)
            if bad and (not on_device or name in KNOWN_AT_ONCE):
                with pytest.raises(ValueError, match=message + ".*; the step is skipped, the weights are restored"):
                    take_step(opt, closure)
            else:
                take_step(opt, closure)
            ends.append(snapshot(model))
            for key, t in ends[-1].items() if bad else ():
                away = 0.0 if exact else 1e-6 if dtype == torch.float32 else 0.1  # the passes' own rounding
                assert (t - before[key]).abs().max() <= away, (name, step, key)
        assert any(not torch.equal(t, ends[4][key]) for key, t in ends[6].items()), name
        # On a device an anchor that was refused is one all the same, and no step follows it until the next.
        without_anchor = on_device and name not in KNOWN_AT_ONCE and method == "MeZOSVRG"
        refused = {0, 1, 2, 5} if without_anchor else {0, 5}
        assert {i for i, record in enumerate(opt.trajectory) if record.refused} == refused, name
        assert opt.refused_steps == len(refused) and opt.step_count == 7
        zo.replay(start, opt.trajectory)
        assert_same(snapshot(start), snapshot(model))


@pytest.mark.parametrize("method", NOT_NORMALIZED)
def test_host_and_device_decide_alike(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit itself, and one bit above."""
    most = 1024.0 * EPS * (0.5 if method == "MeZOSVRG" else 1.0)  # lr of |g| = 1 / EPS; an anchor's is twice that
    for on_device in (False, True):
        losses_stay(monkeypatch, on_device)
        for lr, refused in ((most, 0), (math.nextafter(most, math.inf), 1)):
            model = block_mlp(depth=2, width=4, dtype=torch.float16)
            opt = METHODS[method](model, lr=lr, eps=EPS, perturb="in_forward")
            try:
                take_step(opt, losses_of(model))
            except ValueError:
                assert refused and not on_device
            assert opt.refused_steps == refused


def test_svrg_looks_at_the_anchors_estimate_at_the_rates_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_device in (False, True):
        losses_stay(monkeypatch, on_device)
        model = block_mlp(depth=2, width=4, dtype=torch.float16)
        opt = zo.MeZOSVRG(model, lr=1e-3, eps=EPS, anchor_lr=0.0, perturb="in_forward")
        value = iter([1.0, -1.0] + [0.0] * 4)
        closure = lambda model=model, value=value: zero(model) + next(value)  # noqa: E731
        opt.step(closure, closure)
        opt.param_groups[0]["lr"] = 1024.0  # times 0, the other two estimates, and 1 / EPS, the anchor's
        before = snapshot(model)
        try:
            opt.step(closure, closure)
        except ValueError:
            assert not on_device
        assert opt.refused_steps == 1
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_within_the_limits_nothing_overflows(dtype: torch.dtype) -> None:
    """Weights at half of their dtype's largest number, moved as far as is allowed along the largest noise there is."""
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    largest = max(t.abs().max().item() for t in spec.box_muller(words[:, None], torch.arange(0, 2**32, 2**18)[None]))
    assert 6.5 < largest <= 6.56
    limit, half = Reach.of([dtype]).limit, torch.finfo(dtype).max / 2
    # A step in place is at θ + εz before it and adds -lr g z - εz; MeZO-SVRG's has three estimates.
    for moves in ((limit, -2 * limit, limit + limit), (3 * limit,)):
        t = torch.tensor(half, dtype=dtype)
        for scale in moves:
            t = (t.float() + scale * 6.56).to(dtype)
            assert t.isfinite()


def test_eps_too_large_for_the_weights_is_told_wherever_it_is_set() -> None:
    model = block_mlp(depth=2, dtype=torch.float16)
    before = snapshot(model)
    for cls in METHODS.values():
        with pytest.raises(ValueError, match=r"^eps: expected at most 1024 for float16 weights, got 100000.0"):
            cls(model, lr=1e-3, eps=1e5)
        opt = cls(model, lr=1e-3)
        opt.param_groups[0]["eps"] = 1e5
        with pytest.raises(ValueError, match=r"^eps: expected at most 1024 for float16 weights"):
            take_step(opt, lambda: 1.0)
        opt.param_groups[0]["eps"] = 1e-3
        assert opt.step_count == 0 and len(opt.trajectory) == 0
    assert_same(before, snapshot(model))


def test_a_graph_refuses_what_is_known_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from played import Graphs

    losses_stay(monkeypatch)
    model = block_mlp(depth=2, width=4, dtype=torch.float16)
    start = copy.deepcopy(model)
    opt = zo.MeZO(model, lr=1e-3, eps=EPS, weight_decay=1e-4, perturb="in_forward")
    graphs_here(monkeypatch, Graphs(model).captured)
    pairs = iter([1.0, -1.0] * 100)
    step = opt.graphed(lambda: zero(model) + next(pairs), warmup=1, same_bits=False)
    told: list[Tensor] = []
    for lr in (1e-3, 1e-3, 1e300, 1e3, 1e-3):  # the last but one: in the graph
        opt.param_groups[0]["lr"] = lr
        before = snapshot(model)
        try:
            step()
        except ValueError as error:
            assert lr == 1e300 and "lr: expected a learning rate that float32 holds" in str(error)
        same = all(torch.equal(t, before[name]) for name, t in snapshot(model).items())
        told.append(torch.tensor(same))
    assert [bool(same) for same in told] == [False, False, True, True, False]
    assert opt.refused_steps == 2 and opt.step_count == 5
    zo.replay(start, opt.trajectory)
    assert_same(snapshot(start), snapshot(model))
