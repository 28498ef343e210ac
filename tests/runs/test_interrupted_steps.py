"""What an exception that leaves a step may not hide: changes by others, files, locks, modes, memory."""

from __future__ import annotations

import copy
import gc
import os
import stat
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import check_every, fails_after_the_update, fails_before_a_step, fails_in_putting_back
from models import block_mlp, real_loss
from scripted import METHODS, assert_same, snapshot, take_step
from small_runs import SHAPE, build, go
from torch import nn

import zo_kernels as zo
from zo_kernels.perturbation.reads.watch import Watch
from zo_kernels.trajectory import Kind


class Outside(BaseException):
    """What another thread or a signal's handler raises."""


def halve(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


def stopped(*_: Any) -> Any:
    raise Outside


def before_it_begins(opt: zo.ZeroOrderOptimizer, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    halve(model)
    fails_before_a_step(patch, opt, stopped)


def in_a_hook_before(opt: zo.ZeroOrderOptimizer, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    handle = opt.register_step_pre_hook(lambda *_: (handle.remove(), halve(model), stopped()))


def in_a_hook_after(opt: zo.ZeroOrderOptimizer, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    handle = opt.register_step_post_hook(lambda *_: (handle.remove(), halve(model), stopped()))


@pytest.mark.parametrize("when", [before_it_begins, in_a_hook_before, in_a_hook_after])
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_changes_by_others_stay_noticed(
    method: str, when: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build(method, model)
    go(opt, model, 4)
    steps = opt.step_count + (when is in_a_hook_after)
    with monkeypatch.context() as patch:
        when(opt, model, patch)
        with pytest.raises(Outside):
            take_step(opt, lambda: real_loss(model, 0))
    loaded = snapshot(model)
    with pytest.warns(UserWarning, match=f"something else than the optimizer changed the weights after step {steps}"):
        opt_before = opt.step_count
        go(opt, model, 2)
    assert opt.step_count == opt_before + 2
    with pytest.raises(ValueError, match=f"upto={steps}"):
        zo.replay(start, opt.trajectory)
    assert not all(torch.equal(loaded[name], p) for name, p in model.named_parameters())  # it goes on from these


def test_hooks_of_steps_have_gradients_and_may_load() -> None:
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model)
    kept, seen = copy.deepcopy(opt.state_dict()), []

    def hook(*_: Any) -> None:
        seen.append(torch.is_grad_enabled())
        opt.load_state_dict(kept)
        with opt.streaming():
            real_loss(model, 0)

    opt.register_step_post_hook(hook)
    opt.register_step_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    take_step(opt, lambda: real_loss(model, 0))
    assert seen == [True, True] and opt.step_count == 0 and torch.is_grad_enabled()


@pytest.mark.parametrize(("error", "kept"), [(Outside, True), (TimeoutError, True), (ValueError, False)])
def test_what_keeps_a_step_from_beginning_is_recorded(error: type[BaseException], kept: bool, tmp_path: Path) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model, trajectory=tmp_path / "run.zo")
    go(opt, model, 2)
    before = snapshot(model)

    def hook(*_: Any) -> None:
        handle.remove()
        raise error

    handle = opt.register_step_pre_hook(hook)
    with pytest.raises(error):
        take_step(opt, lambda: real_loss(model, 0))
    assert_same(snapshot(model), before)
    assert len(opt.trajectory) == 2 + kept and opt.step_count == 2
    assert not kept or (opt.trajectory[-1].kind, opt.trajectory[-1].probes) == (Kind.INTERRUPTED, 0)
    go(opt, model, 1)
    zo.replay(start, tmp_path / "run.zo")
    assert_same(snapshot(start), snapshot(model))


class Overriding(zo.MeZO):
    def step(self, closure: Any) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("cls", [zo.MeZO, Overriding])
def test_hooks_run_once(cls: type[zo.MeZO]) -> None:
    model = block_mlp(**SHAPE)
    opt, seen = cls(model, lr=1e-3), []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.step(lambda: real_loss(model, 0))
    assert seen == ["before", "after"]


def test_a_check_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_every(monkeypatch, 2)
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model)
    go(opt, model, 1)
    with monkeypatch.context() as patch, pytest.raises(Outside):
        fails_after_the_update(patch, opt, stopped)
        take_step(opt, lambda: real_loss(model, 1))
    go(opt, model, 2)
    assert opt.step_count == 4
    zo.replay(start, zo.Trajectory.from_bytes(opt.trajectory.to_bytes()))
    assert_same(snapshot(start), snapshot(model))


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_two_exceptions_at_once_are_told_at_the_next_step(
    method: str, perturb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second keeps the weights from being restored: no step is taken from what nobody knows, nor is what was loaded
    since moved.
    """
    model = block_mlp(**SHAPE)
    good = snapshot(model)
    opt = build(method, model, perturb=perturb)
    go(opt, model, 2)
    with monkeypatch.context() as patch, pytest.raises(Outside):
        fails_in_putting_back(patch, stopped)
        take_step(opt, stopped)
    torch.set_grad_enabled(True)
    model.load_state_dict(good)
    if perturb == "in_place":  # in the forward nothing had moved
        with pytest.raises(RuntimeError, match="weights: expected those of a whole step"):
            take_step(opt, lambda: real_loss(model, 0))
        assert_same(snapshot(model), good)
        model.load_state_dict(good)
    with pytest.warns(UserWarning, match="something else"):
        go(opt, model, 1)


def test_a_backend_that_fails_in_a_pass_leaves_weights_that_nobody_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend than the native one is Python, which may end in the middle of a pass."""
    model = block_mlp(**SHAPE)
    good = snapshot(model)
    opt = build("MeZO", model, backend="reference")
    go(opt, model, 2)
    calls = iter(range(100))

    def failing(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise Outside
        return whole(*arguments)

    from zo_kernels.backends import reference

    whole = reference._apply
    with monkeypatch.context() as patch, pytest.raises(Outside):
        patch.setattr(reference, "_apply", failing)
        take_step(opt, lambda: real_loss(model, 0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="weights: expected those of a whole step"):
            take_step(opt, lambda: real_loss(model, 0))
    model.load_state_dict(good)
    with pytest.warns(UserWarning, match="something else"):
        go(opt, model, 1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_memory_that_a_closure_replaces_ends_the_trajectory(backend: str) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model, backend=backend)
    go(opt, model, 2)

    def closure() -> torch.Tensor:
        for p in model.parameters():
            p.data = p.data.clone()
        return real_loss(model, 0)

    with pytest.raises(RuntimeError, match="memory was replaced"):
        take_step(opt, closure)
    go(opt, model, 2)
    with pytest.raises(ValueError, match="upto=2"):
        zo.replay(start, opt.trajectory)


def test_a_watch_that_pytorch_had_just_taken_comes_off_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model, perturb="in_forward")
    enter = Watch.__enter__

    def entering(watch: Watch) -> Any:
        enter(watch)
        raise Outside

    with monkeypatch.context() as patch, pytest.raises(Outside):
        patch.setattr(Watch, "__enter__", entering)
        take_step(opt, lambda: real_loss(model, 0))
    assert torch._C._len_torch_dispatch_stack() == 0
    go(opt, model, 1)


def test_an_optimizer_that_took_no_step_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "run.zo"
    opt = build("MeZO", block_mlp(**SHAPE), trajectory=path)
    opt.state_dict()
    copy.deepcopy(opt)
    del opt
    gc.collect()
    assert not path.exists()


def test_a_file_stays_where_it_was_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model, trajectory="run.zo")
    monkeypatch.chdir(tmp_path / "b")
    go(opt, model, 2)
    assert opt.trajectory_path == tmp_path / "a" / "run.zo" and zo.Trajectory.load(opt.trajectory_path).steps == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model)
    go(opt, model, 1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    opt.trajectory.save(pipe)
    assert os.read(reader, 1 << 16) == opt.trajectory.to_bytes() and stat.S_ISFIFO(os.stat(pipe).st_mode)
    os.close(reader)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["whole", "interrupted"])
def test_steps_keep_nothing_alive(method: str, how: str) -> None:
    """Reference counts alone give up an optimizer and its model's weights."""
    gc.collect()
    gc.disable()
    try:
        model = block_mlp(**SHAPE)
        opt = build(method, model)
        go(opt, model, 1)
        if how == "interrupted":
            with pytest.raises(Outside):
                take_step(opt, stopped)
        gone = weakref.ref(opt)
        del opt
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("anew", ["frozen before", "frozen after", "never frozen"])
def test_an_anchor_is_of_the_weights_that_it_was_taken_of(anew: str, tmp_path: Path) -> None:
    """A run of MeZO-SVRG in which a parameter was frozen on the way, resumed with other ones trained."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    path = tmp_path / "run.zo"
    opt = build("MeZOSVRG", model, trajectory=path)
    go(opt, model, 1)
    model.head.bias.requires_grad_(False)
    go(opt, model, 1)
    end = snapshot(model)
    del opt
    other = copy.deepcopy(start)
    other.head.bias.requires_grad_(anew != "frozen before")
    again = build("MeZOSVRG", other)
    again.resume(path)
    assert_same(snapshot(other), end)
    other.head.bias.requires_grad_(anew == "never frozen")
    go(again, other, 3)
    del again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zo.replay(start, path)
    assert_same(snapshot(start), snapshot(other))


@pytest.mark.parametrize("how", ["frozen", "moved"])
def test_a_run_killed_just_after_its_anchor_was_given_up_goes_on(how: str, tmp_path: Path) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    path = tmp_path / "run.zo"
    opt = build("MeZOSVRG", model, trajectory=path)
    go(opt, model, 2)
    if how == "frozen":
        model.head.bias.requires_grad_(False)
    else:
        model.head.weight.data = model.head.weight.data.clone()
    with pytest.raises(Outside):
        opt.step(stopped, stopped)
    assert opt.trajectory[-1].kind is Kind.INTERRUPTED
    del opt
    other = copy.deepcopy(start)
    other.head.bias.requires_grad_(how != "frozen")
    again = build("MeZOSVRG", other)
    again.resume(path)
    go(again, other, 3)
    zo.replay(start, path)
    assert_same(snapshot(start), snapshot(other))
