"""States with something wrong in them: refused with the field's name, and nothing at all has changed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import attributes_of, fails_in_tables, versions_of
from models import block_mlp, real_loss
from scripted import EPS, METHODS, SEED, assert_same, snapshot, take_step
from torch import nn

import zo_kernels as zo
from zo_kernels.ops import Table

State = dict[str, Any]
OPTIONS = {"lr": 1e-2, "eps": EPS, "seed": SEED, "sparsity": 0.5, "drop": 0.5, "directions": 2, "mask": "kept"}


def build(method: str, model: nn.Module, **options: Any) -> zo.ZeroOrderOptimizer:
    more = {"anchor_lr": 1e-2, "anchor_every": 4, "anneal": 5.0} if method == "MeZOSVRG" else {}
    return METHODS[method](model, **{**OPTIONS, **more, **options})


def run_of(method: str, steps: int, **options: Any) -> tuple[nn.Module, zo.ZeroOrderOptimizer]:
    model = block_mlp(depth=2, width=4)
    opt = build(method, model, **options)
    for i in range(steps):
        take_step(opt, lambda i=i: real_loss(model, i))
    return model, opt


def fingerprint(model: nn.Module, opt: zo.ZeroOrderOptimizer) -> dict[str, Any]:
    """All that a load may change; what is replaced by an equal is found, too."""
    torch_part = [opt.param_groups, opt.state]
    return {
        "state": copy.deepcopy(opt.state_dict()),
        "attributes": attributes_of(opt),
        "objects": [id(x) for x in (*torch_part, *opt.param_groups, *opt.state.values(), versions_of(opt))],
        "weights": snapshot(model),
        "trajectory": opt.trajectory.to_bytes(),
    }


def assert_untouched(before: dict[str, Any], model: nn.Module, opt: zo.ZeroOrderOptimizer) -> None:
    after = fingerprint(model, opt)
    assert str(after["state"]) == str(before["state"])
    assert_same(after["weights"], before["weights"])
    for key in ("objects", "trajectory"):
        assert after[key] == before[key]
    assert after["attributes"].keys() == before["attributes"].keys()
    for key, value in before["attributes"].items():
        assert after["attributes"][key] is value, key


# Where in the state, what is put there (or `GONE`), and what the error says after the name of the field.
GONE = object()
Row = tuple[tuple[Any, ...], Any, str]


def rows(path: tuple[Any, ...], *cases: tuple[Any, str]) -> list[Row]:
    return [(path, value, came) for value, came in cases]


COMMON: list[Row] = [
    (("zo",), [], "expected a dictionary, got list"),
    (("zo", "more"), 1, "expected version, .*got also 'more'"),
    *rows(("zo", "version"), (2, "newer zo_kernels"), (0, "at least 1, got 0"), ("1", "got str"), (True, "got bool")),
    *rows(("zo", "noise"), ("v2", "expected 'v1', got 'v2'"), (GONE, "expected 'v1', got None")),
    *rows(("zo", "method"), ("SGD", "got 'SGD'"), (None, "got None")),
    *rows(("zo", "seed"), (-1, "got -1"), (2**64, f"got {2**64}"), (0.5, "got float"), (GONE, "got none")),
    *rows(("zo", "step_count"), (-1, "got -1"), (2**44, "got 1759"), (True, "got bool"), ("3", "got str")),
    *rows(("zo", "refused_steps"), (-1, "got -1"), (10, "between 0 and 6, got 10"), (None, "got NoneType")),
    *rows(("zo", "directions"), (0, "got 0"), (2**16 + 1, "got 65537"), (2.0, "got float"), (GONE, "got none")),
    *rows(("zo", "drop"), (1.0, "got 1.0"), (-0.1, "got -0.1"), (math.nan, "got nan"), ("0", "got str")),
    *rows(("zo", "distribution"), ("uniform", "'normal', 'rademacher', got 'uniform'"), (None, "got NoneType")),
    *rows(
        ("zo", "param_ids"),
        ([1], "expected 16 entries, .* got 1: it is"),
        (None, "got NoneType"),
        ("ids", "got str"),
    ),
    *rows(("zo", "param_ids", 3), (7, r"for blocks.0.norm.bias, got 7"), (None, "got None")),
    *rows(("zo", "thresholds"), ([], "expected 16 entries, got 0"), (0.5, "got float"), (GONE, "got none")),
    *rows(("zo", "thresholds", 2), (-1.0, "got -1.0"), (math.nan, "got nan"), (math.inf, "got inf"), ("a", "got str")),
    *rows(("param_groups",), (GONE, "got none"), ([], "expected 1 entries, got 0"), (1, "got int")),
    *rows(("param_groups", 0), ([], "expected a dictionary, got list")),
    *rows(
        ("param_groups", 0, "params"), ([0], "expected 16 entries, got 1"), ([0] * 16, "got 0 again"), (GONE, "none")
    ),
    *rows(("param_groups", 0, "params", 0), ([], r"got \[\] again")),
    *rows(
        ("param_groups", 0, "lr"), (-1.0, "got -1.0"), (math.nan, "got nan"), ("fast", "got str"), (GONE, "got none")
    ),
    *rows(("param_groups", 0, "eps"), (0.0, "got 0.0"), (1e31, "at most 1e.30 .*got 1e.31"), (None, "got NoneType")),
    *rows(("param_groups", 0, "weight_decay"), (-1.0, "got -1.0"), (GONE, "got none")),
    *rows(("param_groups", 0, "sparsity"), (1.0, "got 1.0"), (GONE, "got none")),
    *rows(("param_groups", 0, "decay_all"), (1, "got int"), (GONE, "got none")),
    *rows(("state",), (GONE, "got none"), ([], "expected a dictionary, got list"), ({99: {}}, "got one of 99")),
    *rows(("state", 0), ([], "expected a dictionary, got list")),
    *rows(("zo", "mask"), ("fixed", "'redrawn', 'kept', got 'fixed'"), (None, "got NoneType")),
    *rows(("state", 2, "mask"), (GONE, "expected a mask of blocks.0.norm.weight, .*got none"), (None, "got NoneType")),
    *rows(
        ("state", 0, "mask"),
        (torch.zeros(3, dtype=torch.uint8), r"uint8, one bit a weight, of shape \(4, 1\), got uint8 of shape \(3,\)"),
        (torch.zeros(4, 5, dtype=torch.bool), "got bool"),
        (torch.zeros(4, 1), "got float32"),
        (torch.zeros(4, 1, dtype=torch.uint8, device="meta"), "on meta"),
    ),
    *rows(("state", 2, "mask"), (torch.zeros(4, dtype=torch.uint8), r"expected bool of shape \(4,\), got uint8")),
]
SEEDED = [[5, [0.0, 0.0]]]
SVRG: list[Row] = [
    *rows(("zo", "anchor_every"), (0, "got 0"), (2.0, "got float"), (GONE, "got none")),
    *rows(("zo", "shared_direction"), (1, "got int"), (None, "got NoneType")),
    *rows(("zo", "anchor_ok"), (1, "got int"), (GONE, "got none")),
    *rows(("zo", "age"), (-1, "got -1"), (7, "between 0 and 6, got 7"), (1.0, "got float"), (GONE, "got none")),
    *rows(("zo", "dropped"), ([2], "got 2"), ([0, 0], r"block once, got \[0, 0\]"), ([0.0], "got float"), (0, "int")),
    *rows(
        ("zo", "path"),
        ([], "expected all seeds of anchor_gradients"),
        (SEEDED, "expected all seeds of anchor_gradients"),
        ({}, "got dict"),
        (GONE, "got none"),
    ),
    *rows(("zo", "path", 0), ([], "expected 2 entries, got 0"), (None, "got NoneType")),
    *rows(("zo", "path", 0, 0), (-1, "got -1"), (2**64, f"got {2**64}"), (1.0, "got float")),
    *rows(("zo", "path", 0, 1), ([0.0], "expected 2 entries, got 1"), ([0.0] * 4, "got 4"), (0.0, "got float")),
    *rows(
        ("zo", "path", 0, 1, 0), (math.nan, "got nan"), (1e39, r"got 1e\+39"), ("a", "got str"), (None, "got NoneType")
    ),
    *rows(("zo", "path_decays"), ([], "expected some, at age 2"), ([1.0], "got 1"), ([1.0] * 4, "got 4"), (1, "int")),
    *rows(("zo", "path_decays", 1), (math.inf, "got inf"), (None, "got NoneType")),
    *rows(("zo", "anchor_gradients"), ([], "expected some, at age 2"), (None, "NoneType")),
    *rows(("zo", "anchor_gradients", 0), ([1, 2, 3], "expected 2 entries, got 3")),
    *rows(("zo", "anchor_gradients", 0, 1), (math.nan, "got nan"), ([], "got list")),
    *rows(("zo", "anneal"), (1.0, "got 1.0"), ("5", "got str"), (math.inf, "got inf")),
    *rows(("zo", "anneal_above"), (0.5, "got 0.5"), (None, "got NoneType")),
    *rows(("zo", "annealed"), (-1, "got -1"), (7, "between 0 and 6, got 7"), (1.0, "got float")),
    *rows(("zo", "anchor_loss"), (math.nan, "got nan"), ("low", "got str")),
    *rows(("param_groups", 0, "anchor_lr"), (-1.0, "got -1.0"), ("a", "got str"), (GONE, "got none")),
    *rows(("state",), ({}, "expected an anchor of embed.weight, at age 2, got none")),
    *rows(("state", 3, "anchor"), (GONE, "anchor of blocks.0.norm.bias"), (1.0, "got float"), (None, "got NoneType")),
    *rows(
        ("state", 0, "anchor"),
        (torch.zeros(5, 4), r"float32 of shape \(4, 5\) on cpu, .*got float32 of shape \(5, 4\)"),
        (torch.zeros(4, 5, dtype=torch.bfloat16), "got bfloat16"),
        (torch.zeros(4, 5, dtype=torch.int32), "got int32"),
        (torch.zeros(4, 5, device="meta"), "on meta"),
        (torch.zeros(4, 5).to_sparse(), "got sparse_coo"),
    ),
]


def put(state: State, path: tuple[Any, ...], value: Any) -> None:
    inner: Any = state
    for key in path[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value


def field(path: tuple[Any, ...]) -> str:
    """How the beginning of the path is named."""
    return rf"^state_dict: {path[0]}" + (rf"\.{path[1]}" if path[0] == "zo" and path[1:] not in ((), ("more",)) else "")


TABLES = {
    "MeZO": COMMON,
    "MeZOSVRG": [row for row in COMMON if row[:2] != (("state", 0), [])] + SVRG + [(("state", 0), [], "got list")],
}


@pytest.mark.parametrize("method", TABLES)
def test_each_field_is_checked_and_named(method: str) -> None:
    """Of a run that is between two anchors, into one that is elsewhere."""
    source = run_of(method, 6)[1].state_dict()
    model, opt = run_of(method, 3, seed=SEED + 1)
    before = fingerprint(model, opt)
    for path, value, came in TABLES[method]:
        state = copy.deepcopy(source)
        put(state, path, value)
        with pytest.raises((TypeError, ValueError)) as error:
            opt.load_state_dict(state)
        text = str(error.value)
        assert re.search(f"{field(path)}.*{came}", text), (path, value, text)
        assert_untouched(before, model, opt)
    opt.load_state_dict(source)  # it was the field
    assert opt.step_count == 6


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all that a state has, containers included."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [leaf for key, inner in entries for leaf in leaves(inner, (*path, key))]


ANY = st.one_of(
    st.sampled_from([GONE, None, True, -1, 0, 1, 2**16, 2**70, -0.5, 0.5, 1e300, math.nan, math.inf, "", [], {}, [[]]]),
    st.integers(),
    st.floats(),
    st.lists(st.floats(-1, 1), max_size=3),
)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(method=st.sampled_from(["MeZO", "MeZOSVRG"]), data=st.data())
def test_whatever_is_put_anywhere_is_taken_whole_or_not_at_all(method: str, data: st.DataObject) -> None:
    source, model, opt = RUNS[method]
    state = copy.deepcopy(source)
    put(state, data.draw(st.sampled_from(leaves(source))), data.draw(ANY))
    before = fingerprint(model, opt)
    kept = copy.deepcopy(state)
    try:
        opt.load_state_dict(state)
    except (TypeError, ValueError) as error:
        assert str(error).startswith("state_dict")
        assert_untouched(before, model, opt)
        return
    assert str(state) == str(kept)
    loaded = copy.deepcopy(opt.state_dict())
    state["zo"].clear(), state["param_groups"].clear()  # what is the caller's is not ours
    assert str(opt.state_dict()) == str(loaded)
    assert all(t.isfinite().all() for t in snapshot(model).values())
    opt.load_state_dict(loaded)
    opt.load_state_dict(source)


RUNS = {
    method: (run_of(method, 6)[1].state_dict(), *run_of(method, 3, seed=SEED + 1)) for method in ("MeZO", "MeZOSVRG")
}


def fails(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


FAILURES: dict[str, Callable[[pytest.MonkeyPatch, zo.ZeroOrderOptimizer], Any]] = {
    "a hook before": lambda patch, opt: opt.register_load_state_dict_pre_hook(fails),
    "a hook after": lambda patch, opt: opt.register_load_state_dict_post_hook(fails),
    "torch": lambda patch, opt: patch.setattr(torch.optim.Optimizer, "__setstate__", fails),
    "torch, half way": lambda patch, opt: patch.setattr(torch.optim.Optimizer, "_patch_step_function", fails),
    "the tables": lambda patch, opt: fails_in_tables(patch, fails),
    "the first pass": lambda patch, opt: patch.setattr(Table, "apply", fails),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_a_load_that_fails_half_way_is_undone(method: str, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = run_of(method, 6)[1].state_dict()
    model, opt = run_of(method, 3, seed=SEED + 1)
    twin, twin_opt = run_of(method, 3, seed=SEED + 1)
    before = fingerprint(model, opt)
    reached = not (method == "MeZO" and failure in ("the tables", "the first pass"))  # which are made at the next step
    with monkeypatch.context() as patch:
        handle = FAILURES[failure](patch, opt)
        if reached:
            with pytest.raises(KeyboardInterrupt):
                opt.load_state_dict(source)
    if handle is not None:
        handle.remove()
    assert_untouched(before, model, opt)
    for one, its in ((opt, model), (twin_opt, twin)):
        for i in range(4):
            take_step(one, lambda i=i, its=its: real_loss(its, i))
    assert_same(snapshot(model), snapshot(twin))
    assert opt.trajectory == twin_opt.trajectory


@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_states_of_before_versions_load_and_hooks_see_what_torch_loads(method: str) -> None:
    source = run_of(method, 6, mask="redrawn", **({"anneal": None} if method == "MeZOSVRG" else {}))[1].state_dict()
    assert source["zo"].pop("version") == 1
    assert source["zo"].pop("distribution") == "normal"  # as all were
    assert source["zo"].pop("mask") == "redrawn"
    for key in ("anneal", "anneal_above", "annealed", "anchor_loss", "estimator", "normalize", "rms"):
        source["zo"].pop(key, None)
    opt = run_of(method, 3, distribution="rademacher")[1]
    seen: list[Any] = []

    def other_lr(opt: Any, given: State) -> State:
        seen.append(sorted(given))
        groups = [{**group, "lr": 0.25} for group in given["param_groups"]]
        return {**given, "param_groups": groups}

    handle = opt.register_load_state_dict_pre_hook(other_lr)
    for _ in range(2):
        opt.load_state_dict(source)
    assert seen == [["param_groups", "state"]] * 2
    assert opt.param_groups[0]["lr"] == 0.25 and opt.step_count == 6 and opt.distribution == "normal"
    assert opt.mask == "redrawn" and not any("mask" in entry for entry in opt.state.values())
    assert method == "MeZO" or opt.anneal == 5.0
    handle.remove()
    opt.load_state_dict(source)
    assert opt.param_groups[0]["lr"] == 1e-2 and len(seen) == 2
    opt.register_load_state_dict_pre_hook(lambda opt, given: {**given, "param_groups": []})
    with pytest.raises(ValueError, match="param_groups: expected 1 entries, got 0"):
        opt.load_state_dict(source)


def test_blocks_that_a_state_drops_must_be_known() -> None:
    source = run_of("MeZO", 2)[1].state_dict()
    opt = run_of("MeZO", 1, drop=0.0)[1]
    with pytest.raises(ValueError, match=r"^state_dict: zo\.drop: expected 0, .* got 0\.5"):
        opt.load_state_dict(source)
    assert opt.drop == 0.0 and opt.step_count == 1


@pytest.mark.parametrize("given", [None, [], "state", {}, {"state": {}, "param_groups": []}], ids=str)
def test_what_is_no_state_is_refused(given: Any) -> None:
    model, opt = run_of("MeZO", 1)
    before = fingerprint(model, opt)
    with pytest.raises((TypeError, ValueError), match=r"^state_dict: expected (a dictionary|the state of a z)"):
        opt.load_state_dict(given)
    assert_untouched(before, model, opt)
