"""Saving, loading and copying."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import block_mlp, grown, real_loss
from scripted import (
    EPS,
    LR,
    METHODS,
    SEED,
    assert_same,
    snapshot,
    take_step,
)
from torch import nn

import zo_kernels as zo


def go_on(opt: zo.ZeroOrderOptimizer, model: nn.Module, steps: range) -> list[float]:
    """Steps on real losses; the data go by the step."""
    return [take_step(opt, lambda i=i: real_loss(model, i), lambda: real_loss(model, 1000)).item() for i in steps]


def assert_same_future(a: tuple[Any, nn.Module], b: tuple[Any, nn.Module], steps: range) -> None:
    assert go_on(*a, steps) == go_on(*b, steps)
    assert_same(snapshot(a[1]), snapshot(b[1]))


OPTIONS = st.fixed_dictionaries(
    {
        "directions": st.integers(1, 2),
        "sparsity": st.sampled_from([0.0, 0.5]),
        "mask": st.sampled_from(["redrawn", "kept"]),
        "drop": st.sampled_from([0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "perturb": st.sampled_from(["in_place", "in_forward"]),
        "distribution": st.sampled_from(["normal", "rademacher"]),
        "normalize": st.sampled_from(["none", "rms"]),
    }
)


def build(method: str, model: nn.Module, seed: int = SEED, **options: Any) -> zo.ZeroOrderOptimizer:
    if method == "MeZOSVRG":
        options = {"anchor_lr": 1e-2, "anchor_every": 4, "anneal": 2.0, "anneal_above": 1.0, **options}
    if method in ("MeZOSVRG", "FZOO"):
        options.pop("normalize", None)
    if method == "FZOO":
        options["directions"] = 1 + options.get("directions", 1)
    return METHODS[method](model, **{"lr": 1e-2, "eps": EPS, "seed": seed, "perturb": "in_place", **options})


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    method=st.sampled_from(list(METHODS)),
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    steps=st.integers(0, 9),
    model_first=st.booleans(),
)
def test_a_loaded_run_goes_on_bit_for_bit(method, options, dtype, steps, model_first) -> None:
    model = block_mlp(depth=2, dtype=dtype)
    opt = build(method, model, **options)
    go_on(opt, model, range(steps))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only: nothing but tensors and plain values

    other = block_mlp(depth=2, dtype=dtype, seed=1)
    other_opt = build(method, other, seed=SEED + 1, **{**options, "distribution": "normal", "mask": "redrawn"})
    if model_first:
        other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    other.load_state_dict(saved["model"])
    assert_same(snapshot(model), snapshot(other))
    assert_same_future((opt, model), (other_opt, other), range(steps, steps + 6))
    assert other_opt.step_count == steps + 6
    assert (other_opt.distribution, other_opt.mask) == (options["distribution"], options["mask"])


@pytest.mark.parametrize("steps", range(9))
@pytest.mark.parametrize("shared", [True, False])
def test_svrg_resumes_at_every_point_of_a_period(steps: int, shared: bool) -> None:
    """The optimizer alone brings the weights back, and shares no memory with the state it was given."""
    options = {"sparsity": 0.3, "drop": 0.5, "shared_direction": shared, "mask": "kept" if shared else "redrawn"}
    model, other = block_mlp(), block_mlp()
    opt, other_opt = build("MeZOSVRG", model, **options), build("MeZOSVRG", other, **options)
    go_on(opt, model, range(steps))
    state = opt.state_dict()
    other_opt.load_state_dict(state)
    assert_same(snapshot(model), snapshot(other))
    theirs = {t.data_ptr() for p in state["state"].values() for t in p.values()}
    assert not theirs & {t.data_ptr() for p in other_opt.state.values() for t in p.values()}
    kept = copy.deepcopy(state)
    go_on(other_opt, other, range(steps, steps + 6))
    assert {k: str(v) for k, v in kept.items()} == {k: str(v) for k, v in state.items()}
    go_on(opt, model, range(steps, steps + 6))
    assert_same(snapshot(model), snapshot(other))
    assert kept["zo"] == state["zo"]  # tensors of a state are torch's affair; the rest is ours to copy


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copied_optimizer_goes_on_bit_for_bit(method: str, scheduled: bool, how: str) -> None:
    model = block_mlp()
    opt = build(method, model, sparsity=0.5, mask="kept" if scheduled else "redrawn")
    if scheduled:  # a scheduler puts a wrapped step into the optimizer
        torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1.0)
    go_on(opt, model, range(6))
    pair = (opt, model)
    other_opt, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = snapshot(model)
    ours = go_on(other_opt, other, range(6, 12))
    assert_same(before, snapshot(model))  # the copy steps its own weights
    assert go_on(opt, model, range(6, 12)) == ours
    assert_same(snapshot(model), snapshot(other))


def renamed(model: nn.Module) -> nn.Module:
    other = nn.Module()
    other.other = model
    return other


WRONG_STATES: dict[str, tuple[Callable[[str], torch.optim.Optimizer], str]] = {
    "other names": (lambda method: build(method, renamed(block_mlp())), r"param_ids"),
    "not zeroth order": (lambda method: torch.optim.SGD(block_mlp().parameters(), lr=LR), r"zeroth-order"),
    "more parameters": (lambda method: build(method, grown(block_mlp())), r"param_ids"),
}


@pytest.mark.parametrize("state", WRONG_STATES)
@pytest.mark.parametrize("method", METHODS)
def test_states_of_something_else_are_refused(method: str, state: str) -> None:
    source, message = WRONG_STATES[state]
    model = block_mlp()
    opt = build(method, model)
    go_on(opt, model, range(2))
    ours, before = copy.deepcopy(opt.state_dict()), snapshot(model)
    with pytest.raises(ValueError, match=rf"state_dict: .*{message}"):
        opt.load_state_dict(source(method).state_dict())
    assert str(opt.state_dict()) == str(ours)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method, source", list(itertools.permutations(METHODS, 2)))
def test_states_of_another_method_are_refused(method: str, source: str) -> None:
    model, other = block_mlp(), block_mlp()
    opt, other_opt = build(method, model), build(source, other)
    go_on(opt, model, range(2))
    go_on(other_opt, other, range(3))
    ours, before = copy.deepcopy(opt.state_dict()), snapshot(model)
    with pytest.raises(ValueError, match=rf"state_dict: zo.method: expected '{method}', got '{source}'"):
        opt.load_state_dict(other_opt.state_dict())
    assert str(opt.state_dict()) == str(ours)
    assert_same(before, snapshot(model))


def through_checkpoint(path: Path, source: dict[str, Any], target: dict[str, Any]) -> None:
    """torch.distributed.checkpoint, without processes: it fills what is there already."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save(source, checkpoint_id=path)
        dcp.load(target, checkpoint_id=path)


@pytest.mark.parametrize("stateful", [True, False], ids=["objects", "dictionaries"])
@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("method", METHODS)
def test_a_distributed_checkpoint_goes_on_bit_for_bit(
    method: str, perturb: str, stateful: bool, tmp_path: Path
) -> None:
    options = {"sparsity": 0.5, "drop": 0.5, "directions": 2, "perturb": perturb}
    options["mask"] = "kept" if stateful else "redrawn"
    model, other = block_mlp(), block_mlp(seed=1)
    opt = build(method, model, **options, distribution="rademacher")
    other_opt = build(method, other, SEED + 1, **options)
    go_on(opt, model, range(6))
    if stateful:
        through_checkpoint(tmp_path, {"model": model, "opt": opt}, {"model": other, "opt": other_opt})
    else:
        target = {"model": other.state_dict(), "opt": other_opt.state_dict()}
        through_checkpoint(tmp_path, {"model": model.state_dict(), "opt": opt.state_dict()}, target)
        other.load_state_dict(target["model"])
        other_opt.load_state_dict(target["opt"])
    assert_same(snapshot(model), snapshot(other))
    assert_same_future((opt, model), (other_opt, other), range(6, 12))


@pytest.mark.parametrize("method", METHODS)
def test_weights_as_safetensors_and_the_state_beside_them(method: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = block_mlp(dtype=torch.bfloat16), block_mlp(dtype=torch.bfloat16, seed=1)
    opt, other_opt = build(method, model), build(method, other)
    go_on(opt, model, range(5))
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    other_opt.load_state_dict(torch.load(tmp_path / "opt.pt"))
    assert_same_future((opt, model), (other_opt, other), range(5, 11))
