"""Steps whose losses stay on the device, and steps captured in a graph: the bits of ordinary steps.

Both are for GPUs. Here tensors on the CPU take the same way, and a graph is played by calling its body again.
"""

from __future__ import annotations

import functools
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import graphs_here, losses_stay, recording_of
from models import block_mlp, real_loss
from played import Graphs
from scripted import METHODS, Script, assert_same, snapshot, take_step
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import backends
from zo_kernels.backends import pending

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "directions": {"directions": 3, "weight_decay": 0.1, "distribution": "rademacher"},
    "bf16": {"directions": 2},
    "rms": {"normalize": "rms", "directions": 5},
    "one-sided": {"estimator": "one_sided", "normalize": zo.RMS(beta=0.5, delta=0.1), "weight_decay": 0.1},
}
OWN_ESTIMATOR = {"MeZOSVRG", "FZOO"}
EACH = [(m, o) for m in METHODS for o in OPTIONS if m not in OWN_ESTIMATOR or o not in ("rms", "one-sided")]
GRAPHED = [(m, o) for m, o in EACH if m in ("MeZO", "SparseMeZO", "FZOO")]
PERTURB = ("in_place", "in_forward")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is taken for one on a GPU."""
    losses_stay(monkeypatch)


def make(method: str, perturb: str, options: str) -> tuple[nn.Module, zo.ZeroOrderOptimizer]:
    torch.manual_seed(0)
    model = block_mlp()
    if options == "bf16":
        model = model.bfloat16()
    kwargs: dict[str, Any] = {"anchor_every": 3, "anchor_lr": 0.02} if method == "MeZOSVRG" else {}
    return model, METHODS[method](model, lr=0.05, eps=1e-2, perturb=perturb, **OPTIONS[options], **kwargs)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: real_loss(model, 0)


class Failing:
    """A real loss that is not finite at some of its calls."""

    def __init__(self, model: nn.Module, bad: dict[int, float]):
        self.loss, self.bad, self.calls = loss_of(model), bad, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.loss() * self.bad.get(self.calls - 1, 1.0)


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize(("method", "options"), EACH)
def test_equal_bits(monkeypatch: pytest.MonkeyPatch, method: str, perturb: str, options: str) -> None:
    ends = []
    for deferred in (False, True):
        losses_stay(monkeypatch, deferred)
        model, opt = make(method, perturb, options)
        loss = loss_of(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        seen = []
        for _ in range(7):
            seen.append(float(take_step(opt, loss)))
            scheduler.step()
        ends.append((snapshot(model), opt.trajectory.to_bytes(), opt.projected_gradients, seen, opt.refused_steps))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert any(not torch.equal(t, ends[0][0][n]) for n, t in snapshot(make(method, perturb, options)[0]).items())


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38], ids=str)
@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("method", METHODS)
def test_refused_without_a_word(method: str, perturb: str, bad: float) -> None:
    """A loss that is not finite, in the middle of a run: no update, and a trajectory that leads to the same weights."""
    model, opt = make(method, perturb, "decay")
    start = snapshot(model)
    calls_a_step = {"MeZOSVRG": 4, "FZOO": 9}.get(method, 2)  # but 2 in the step at an anchor
    failing = Failing(model, {calls_a_step * 2 - (2 if method == "MeZOSVRG" else 0) + 1: bad})
    for step in range(5):
        before = snapshot(model)
        take_step(opt, failing)
        after = snapshot(model)
        refused = step == 2
        if refused and perturb == "in_forward":
            for name in before:
                assert torch.equal(before[name], after[name])
        elif refused:
            for name in before:
                torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-6)
        else:
            assert any(not torch.equal(before[name], after[name]) for name in before)
    assert opt.refused_steps == 1 and opt.step_count == 5
    assert [record.refused for record in opt.trajectory] == [False, False, True, False, False]
    end = snapshot(model)
    replayed, _ = make(method, perturb, "decay")
    assert_same(snapshot(replayed), start)
    zo.replay(replayed, opt.trajectory)
    assert_same(snapshot(replayed), end)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("perturb", PERTURB)
def test_refused_anchor(perturb: str) -> None:
    """Without an estimate at the anchor there is no step until the next one."""
    model, opt = make("MeZOSVRG", perturb, "decay")
    failing = Failing(model, {0: math.nan})
    start = snapshot(model)
    for _ in range(3):
        take_step(opt, failing)
        for name, t in snapshot(model).items():
            assert torch.equal(t, start[name])
    saved = pickle.loads(pickle.dumps(opt.state_dict()))
    assert saved["zo"]["anchor_ok"] is False
    for _ in range(3):
        take_step(opt, failing)
    assert opt.refused_steps == 3
    assert any(not torch.equal(t, start[name]) for name, t in snapshot(model).items())
    end = snapshot(model)
    replayed, _ = make("MeZOSVRG", perturb, "decay")
    zo.replay(replayed, opt.trajectory)
    assert_same(snapshot(replayed), end)


@pytest.mark.usefixtures("on_device")
def test_losses_of_other_kinds() -> None:
    model, opt = make("MeZO", "in_place", "plain")
    start = snapshot(model)
    for loss, error in [(torch.ones(2), ValueError), (torch.tensor(True), TypeError), (torch.tensor(1j), TypeError)]:
        with pytest.raises(error, match="closure: expected a scalar loss"):
            opt.step(lambda loss=loss: loss)
    for name, t in snapshot(model).items():
        torch.testing.assert_close(t, start[name], rtol=0, atol=1e-6)
    # Numbers and tensors may come in turn.
    values = iter([torch.tensor(0.5), 0.25])
    opt.step(lambda: next(values))
    assert opt.projected_gradients == [(0.5 - 0.25) / 0.02]


class Slow:
    """An event that is over when it is told."""

    over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


@pytest.mark.usefixtures("on_device")
def test_the_file_waits_for_the_losses_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    events: list[Slow] = []
    putting = pending.Pending.putting

    def slowly(self: pending.Pending, values: Tensor, then: Any) -> Any:
        put = putting(self, values, then)
        events.append(Slow())
        values, _, then = put.args[0]
        return functools.partial(put.func, (values, events[-1], then))

    monkeypatch.setattr(pending.Pending, "putting", slowly)
    model, opt = make("MeZO", "in_place", "plain")
    path = tmp_path / "run.zo"
    opt.record_to(path)
    closure = Script(model)
    for _ in range(4):
        opt.step(closure)
    assert len(zo.Trajectory.load(path)) == 0 and opt.step_count == 4
    events[0].over = events[1].over = True
    opt.step(closure)
    assert len(zo.Trajectory.load(path)) == 2
    assert not any(event.over for event in events[2:])
    assert len(opt.trajectory) == 5 and all(event.over for event in events)
    assert zo.Trajectory.load(path) == opt.trajectory
    opt.step(closure)
    assert len(zo.Trajectory.load(path)) == 5
    gone = weakref.ref(recording_of(opt))
    del opt
    assert gone() is None, "what is pending keeps the optimizer alive"
    assert len(zo.Trajectory.load(path)) == 6


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize(("method", "options"), GRAPHED)
def test_graphed(monkeypatch: pytest.MonkeyPatch, method: str, perturb: str, options: str) -> None:
    ends = []
    for graph in (False, True):
        model, opt = make(method, perturb, options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        loss = loss_of(model)
        calls = [0]

        def closure(loss: Any = loss, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return loss()

        graphs = Graphs(model)
        graphs_here(monkeypatch, graphs.captured)
        step = opt.graphed(closure, warmup=2) if graph else lambda opt=opt, closure=closure: opt.step(closure)
        seen = []
        for i in range(8):
            if i == 6:  # captured anew
                opt.param_groups[0]["eps"] = 2e-2
            seen.append(float(step()))
            scheduler.step()
        assert graphs.captures == (4 if graph else 0)  # of two steps, and of the closure before each
        ends.append((snapshot(model), opt.trajectory.to_bytes(), opt.projected_gradients, seen, opt.step_count))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_what_cannot_be_graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = make("MeZO", "in_place", "plain")
    with pytest.raises(ValueError, match="graphs need weights on a CUDA device, got cpu"):
        opt.graphed(loss_of(model))
    graphs_here(monkeypatch)
    for method, reason in {"LeZO": "with drop, every step", "MeZOSVRG": "at an anchor and between anchors"}.items():
        model, opt = make(method, "in_place", "plain")
        with pytest.raises(ValueError, match=reason):
            opt.graphed(loss_of(model))
    model, opt = make("MeZO", "in_place", "plain")
    with pytest.raises(TypeError, match="closure: expected a function"):
        opt.graphed(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup: expected"):
        opt.graphed(loss_of(model), warmup=0)
    with pytest.raises(TypeError, match="same_bits: expected a bool, got int"):
        opt.graphed(loss_of(model), same_bits=1)  # type: ignore[arg-type]
    # A capture that fails leaves no step behind.
    step = opt.graphed(lambda: 0.5, warmup=1)
    graphs_here(monkeypatch, Graphs(model).captured)
    step()
    with pytest.raises(ValueError, match="closure: expected losses on cpu, for a graph, got float"):
        step()
    assert opt.step_count == 1 and len(opt.trajectory) == 1


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_triton_reads_the_numbers_from_memory(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    if "triton" not in backends.available(torch.device("cpu")):
        pytest.skip("Triton runs no interpreter here")
    ends = []
    for backend in ("native", "triton"):
        torch.manual_seed(0)
        model = nn.Linear(8, 2, bias=False)  # a program of the interpreter takes a good part of a second
        opt = METHODS[method](model, lr=0.05, eps=1e-2, weight_decay=0.1, directions=2, backend=backend)
        for _ in range(1 + (method == "MeZOSVRG")):
            take_step(opt, Script(model))
        ends.append((snapshot(model), opt.trajectory.to_bytes()))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
