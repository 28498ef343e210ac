"""Trajectories: replayed, they are the run; damaged or foreign, they are refused."""

from __future__ import annotations

import copy
import pickle
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import check_every
from matrix import BACKENDS
from models import block_mlp, real_loss
from scripted import METHODS, assert_same, snapshot, take_step
from small_runs import SHAPE, build, go, same_after_replay
from torch import nn

import zo_kernels as zo
from zo_kernels.trajectory import Kind

OPTIONS = st.fixed_dictionaries(
    {
        "perturb": st.sampled_from(["in_place", "in_forward"]),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "directions": st.integers(1, 3),
        "sparsity": st.sampled_from([0.0, 0.5]),
        "mask": st.sampled_from(["redrawn", "kept"]),
        "drop": st.sampled_from([0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "distribution": st.sampled_from(["normal", "rademacher"]),
    }
)
ESTIMATORS = st.fixed_dictionaries(
    {
        "estimator": st.sampled_from(["two_sided", "one_sided"]),
        "normalize": st.sampled_from(["none", "std", "rms", zo.RMS(beta=0.5, delta=1e-3)]),
    }
)
# What may happen between the steps of a run.
EVENTS = ["step", "step", "step", "nan", "overflow", "raise", "rate", "eps", "decay", "freeze", "unfreeze"]


def happen(event: str, opt: zo.ZeroOrderOptimizer, model: nn.Module, calls: int) -> None:
    """`calls`: at which call of the closure a bad step goes wrong."""
    counter = iter(range(100))

    def bad() -> Any:
        loss = real_loss(model, opt.step_count)
        call = next(counter)
        if event == "overflow":
            return 1e300 * (-1) ** call
        if call < calls:
            return loss
        if event == "raise":
            raise RuntimeError("no more")
        return float("nan")

    match event:
        case "step":
            go(opt, model, 1)
        case "nan" | "overflow" | "raise":
            with pytest.raises((ValueError, RuntimeError), match=r"closure|no more"):
                take_step(opt, bad)
        case "rate":
            opt.param_groups[0]["lr"] *= 0.7
        case "eps":
            opt.param_groups[0]["eps"] *= 1.5
        case "decay":
            opt.param_groups[0]["weight_decay"] += 0.05
        case "freeze" | "unfreeze":
            model.blocks[0].up.weight.requires_grad_(event == "unfreeze")


@settings(max_examples=45, deadline=None, database=None, derandomize=True)
@given(
    method=st.sampled_from(list(METHODS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    options=OPTIONS,
    shared=st.booleans(),
    estimator=ESTIMATORS,
    events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 1)), min_size=1, max_size=10),
)
def test_replay_is_the_run(method, dtype, options, shared, estimator, events) -> None:
    """Whatever happened in it, at every step, in one pass or in parts, and with other threads."""
    model = block_mlp(dtype=dtype, **SHAPE)
    start = copy.deepcopy(model)
    if method == "MeZOSVRG":
        options = {**options, "shared_direction": shared}
    else:
        options = {**options, **(estimator if method != "FZOO" else {}), "directions": options["directions"] + 1}
    opt = build(method, model, **options)
    after = {}
    for event, calls in events:
        happen(event, opt, model, calls)
        after[opt.step_count] = snapshot(model)
    trajectory = opt.trajectory
    assert trajectory.steps == (max(after) if trajectory.setups else 0)
    same_after_replay(start, trajectory, None, snapshot(model))
    # A later event at the same step count may have changed weights: interrupted steps in place leave their rounding.
    last_interrupted = {r.step for r in trajectory if r.kind is Kind.INTERRUPTED}
    for upto in set(after) - last_interrupted:
        if trajectory.setups and upto >= trajectory.setups[0][1].step:
            same_after_replay(start, trajectory, upto, after[upto])


@pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=lambda x: str(x))
def test_every_backend_replays_to_the_same_bits(backend: str, device: torch.device) -> None:
    signs = {"distribution": "rademacher"}
    for dtype, options in (
        (torch.bfloat16, {}),
        (torch.float32, {"perturb": "in_place", "sparsity": 0.5}),
        (torch.bfloat16, signs),
        (torch.float32, {"directions": 2, **signs}),
    ):
        model = block_mlp(depth=1, width=4, dtype=dtype)
        start = copy.deepcopy(model)
        opt = build("MeZO", model, **options)
        go(opt, model, 2)
        moved = copy.deepcopy(start).to(device)
        zo.replay(moved, opt.trajectory, backend=backend)
        assert_same({n: p.cpu() for n, p in snapshot(moved).items()}, snapshot(model))


@pytest.mark.parametrize(
    ("distribution", "steps", "together"),
    [("normal", 20, 1), ("normal", 22, 2), ("rademacher", 64, 1), ("rademacher", 65, 2)],
)
def test_threads_and_passes_put_together_change_no_bit(
    distribution: str, steps: int, together: int, passes: list[set[str]]
) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model, perturb="in_place", distribution=distribution)
    final = go(opt, model, steps)[-1]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        passes.clear()
        same_after_replay(start, opt.trajectory, None, final)
        assert len(passes) == together  # of three a step in the run
    torch.set_num_threads(1)


def test_what_a_record_says() -> None:
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model, directions=2)
    losses: list[float] = []
    opt.step(lambda: losses.append(real_loss(model, 0).item()) or losses[-1])
    opt.param_groups[0]["lr"] = 0.5
    go(opt, model, 1)
    first, second = opt.trajectory
    assert first.losses == ((losses[0], losses[1]), (losses[2], losses[3]))
    assert first.loss == pytest.approx(sum(losses) / 4)
    assert (first.step, first.rates, second.step, second.rates) == (0, (1e-2,), 1, (0.5,))
    assert second.projected_gradients == opt.projected_gradients
    assert opt.trajectory[-1] == second and opt.trajectory[:1] == [first] and len(opt.trajectory) == 2
    with pytest.raises(IndexError):
        opt.trajectory[2]


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_at_most_32_bytes_a_direction(method: str, directions: int, tmp_path: Path) -> None:
    """With a rate that changes in every step."""
    model = block_mlp(**SHAPE)
    directions += directions == 1 and method == "FZOO"
    opt = build(method, model, directions=directions, trajectory=tmp_path / "run.zo")
    sizes = []
    for i in range(7):
        opt.param_groups[0]["lr"] = 1e-2 / (i + 1)
        go(opt, model, 1)
        sizes.append((tmp_path / "run.zo").stat().st_size)
        assert zo.Trajectory.load(tmp_path / "run.zo") == opt.trajectory  # as it goes
    assert max(b - a for a, b in pairwise(sizes)) <= 32 * directions


def test_losses_that_are_no_float32_are_kept_exactly() -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model, perturb="in_place")
    opt.step(iter([1.0 + 1e-12, 1.0 / 3]).__next__)
    opt.step(iter([1e39, 1e39 * (1 + 1e-16)]).__next__)
    assert opt.trajectory[0].losses == ((1.0 + 1e-12, 1.0 / 3),)
    same_after_replay(start, opt.trajectory, None, snapshot(model))


def test_groups_names_and_wrappers() -> None:
    """Rates for each group; the module may be wrapped, or its named parameters given instead."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "lr": 0.02}, {"params": named[3:], "weight_decay": 0.1}]
    opt = build("MeZO", groups, perturb="in_place")
    final = go(opt, model, 3)[-1]
    assert opt.trajectory[0].rates == (0.02, 1e-2)
    same_after_replay(start, opt.trajectory, None, final)
    for give in (lambda m: m.named_parameters(), lambda m: nn.ModuleDict({"module": m})):
        other = copy.deepcopy(start)
        zo.replay(give(other), opt.trajectory)
        assert_same(snapshot(other), final)


def test_every_truncation_is_refused_or_cut_to_whole_steps(saved) -> None:
    start, path, seen = saved
    whole = path.read_bytes()
    ends = {len(whole) - 24 * (5 - n): n for n in range(6)}
    header = len(whole) - 24 * 5
    for size in (0, 1, 7, 8, 9, 20, header // 2, *range(header - 1, len(whole))):
        path.write_bytes(whole[:size])
        if size in ends or size == 8:  # sound, only shorter
            zo.Trajectory.load(path)
        else:
            with pytest.raises(ValueError, match=r"run\.zo: (expected a trajectory|record \d+, at byte \d+: cut off)"):
                zo.Trajectory.load(path)
        trajectory = zo.Trajectory.load(path, recover=True)
        assert trajectory.steps == max((n for end, n in ends.items() if end <= size), default=0)
        same_after_replay(start, trajectory, None, seen[trajectory.steps])


def test_every_flipped_bit_is_noticed(saved) -> None:
    """Never other weights: an error, or with `recover` the weights of an earlier step."""
    start, path, seen = saved
    whole = path.read_bytes()
    draw = random.Random(0)
    header = len(whole) - 24 * 5
    places = [*range(16), *draw.sample(range(16, header), 40), *range(header, len(whole))]
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run\.zo: (expected a trajectory|record \d+, at byte \d+: )"):
            zo.Trajectory.load(path)
        if at < 8:
            continue
        trajectory = zo.Trajectory.load(path, recover=True)
        assert trajectory.steps == (0 if at < header else (at - header) // 24)
        same_after_replay(start, trajectory, None, seen[trajectory.steps])


@pytest.mark.parametrize("change", ["swapped", "left out", "repeated", "of another run"])
def test_records_out_of_their_order_are_noticed(saved, change: str) -> None:
    _, path, _ = saved
    whole = path.read_bytes()
    header = len(whole) - 24 * 5
    records = [whole[header + 24 * i : header + 24 * (i + 1)] for i in range(5)]
    if change == "of another run":
        model = block_mlp(seed=1, **SHAPE)
        opt = build("MeZO", model)
        go(opt, model, 5)
        records[2] = opt.trajectory.to_bytes()[-3 * 24 : -2 * 24]
    else:
        order = {"swapped": [0, 2, 1, 3, 4], "left out": [0, 2, 3, 4], "repeated": [0, 1, 1, 2, 3, 4]}[change]
        records = [records[i] for i in order]
    path.write_bytes(whole[:header] + b"".join(records))
    with pytest.raises(ValueError, match="its checksum is wrong"):
        zo.Trajectory.load(path)


def other_values(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.head.bias[1] += 1e-7
    return model


FOREIGN = {
    "another value": (other_values, r"weights that the run started with, got other values in head\.bias"),
    "another shape": (lambda m: block_mlp(depth=2, width=5), r"embed\.weight: expected float32 of shape \(4, 5\)"),
    "another dtype": (lambda m: m.bfloat16(), r"embed\.weight: expected float32 .*got bfloat16"),
    "fewer blocks": (lambda m: block_mlp(depth=1, width=4), r"blocks\.1\.norm\.weight: expected a parameter of this"),
    "other names": (lambda m: nn.ModuleDict({"a": m, "b": nn.Linear(1, 1)}), r"embed\.weight: expected a parameter"),
    "no names": (lambda m: m.parameters(), r"embed\.weight: expected a parameter of this name"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_weights_are_refused_and_left_alone(saved, foreign: str) -> None:
    start, path, _ = saved
    make, message = FOREIGN[foreign]
    given = make(start)
    given = list(given) if not isinstance(given, nn.Module) else given
    tensors = list(given.parameters()) if isinstance(given, nn.Module) else given
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(ValueError, match=message):
        zo.replay(given, path)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_steps_that_are_not_there_are_refused(saved) -> None:
    start, path, seen = saved
    for upto, error in ((6, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="upto: "):
            zo.replay(start, path, upto)
    assert_same(snapshot(start), seen[0])
    with pytest.raises(ValueError, match="expected a trajectory, which begins with"):
        path.write_text("no trajectory at all")
        zo.replay(start, path)
    with pytest.raises(FileNotFoundError):
        zo.replay(start, path.with_name("none"))


@pytest.mark.parametrize("method", METHODS)
def test_weights_changed_by_others_end_what_can_be_replayed(method: str) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build(method, model)
    middle = go(opt, model, 4)[-1]
    with torch.no_grad():
        model.head.weight[0, 0] += 1.0
    with pytest.warns(UserWarning, match=r"changed the weights after step 4 .*upto=4"):
        go(opt, model, 2)
    same_after_replay(start, opt.trajectory, 4, middle)
    for upto in (5, None):
        with pytest.raises(ValueError, match=r"something other .* after step 4 .*upto=4"):
            zo.replay(copy.deepcopy(start), opt.trajectory, upto)


def test_weights_changed_unnoticed_are_found_by_the_next_setup() -> None:
    """`p.data` changes no version; a setup, here of another eps, has fingerprints."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model)
    go(opt, model, 2)
    model.head.weight.data[0, 0] += 1.0
    opt.param_groups[0]["eps"] *= 2
    go(opt, model, 2)
    with pytest.raises(ValueError, match=r"the run had after step 2, got other values in head\.weight"):
        zo.replay(start, opt.trajectory)


@pytest.mark.parametrize("method", METHODS)
def test_weights_changed_unnoticed_are_found_by_the_next_check(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_every(monkeypatch, 4)
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build(method, model, anchor_every=8) if method == "MeZOSVRG" else build(method, model)
    fourth = go(opt, model, 4)[-1]
    same_after_replay(start, opt.trajectory, None, fourth)
    (opt.state[model.head.weight]["anchor"] if method == "MeZOSVRG" else model.head.weight.data)[0, 0] += 1.0
    seventh = go(opt, model, 3)[-1]
    assert not torch.equal(seventh["head.weight"][0, 0], fourth["head.weight"][0, 0])
    go(opt, model, 2)
    same_after_replay(start, opt.trajectory, 4, fourth)
    with pytest.raises(ValueError, match=r"to step 8 gives other weights than the run had"):
        zo.replay(copy.deepcopy(start), opt.trajectory)
    assert len(opt.trajectory) == 9  # checks are no steps


def test_a_loaded_state_begins_a_trajectory_of_its_own() -> None:
    model = block_mlp(**SHAPE)
    opt = build("MeZOSVRG", model)
    go(opt, model, 4)
    other = copy.deepcopy(model)
    again = build("MeZOSVRG", other)
    again.load_state_dict(opt.state_dict())
    go(again, other, 1)
    with pytest.raises(ValueError, match="begins between two anchors"):
        zo.replay(copy.deepcopy(model), again.trajectory)
    plain, plain_other = block_mlp(**SHAPE), block_mlp(**SHAPE)
    first, second = build("MeZO", plain), build("MeZO", plain_other)
    middle = go(first, plain, 4)[-1]
    plain_other.load_state_dict(middle)
    second.load_state_dict(first.state_dict())
    began = copy.deepcopy(plain_other)
    final = go(second, plain_other, 2)[-1]
    assert second.trajectory.steps == 6 and second.trajectory[0].step == 4
    same_after_replay(began, second.trajectory, None, final)


def test_record_to_writes_what_there_is_and_copies_write_nothing(tmp_path: Path) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model)
    go(opt, model, 2)
    opt.record_to(tmp_path / "run.zo")
    go(opt, model, 1)
    written = (tmp_path / "run.zo").read_bytes()
    assert written == opt.trajectory.to_bytes()
    for other, other_model in (copy.deepcopy((opt, model)), pickle.loads(pickle.dumps((opt, model)))):
        final = go(other, other_model, 1)[-1]
        assert other.trajectory.steps == 4
        same_after_replay(start, other.trajectory, None, final)
    assert (tmp_path / "run.zo").read_bytes() == written
