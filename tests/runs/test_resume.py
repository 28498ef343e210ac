"""Runs that were cut off go on with the same bits, from their first weights or from a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import block_mlp
from scripted import METHODS, assert_same, snapshot
from small_runs import SHAPE, build, go, same_after_replay

import zo_kernels as zo


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [0, 3, 8, 30, 1000])
def test_resume_goes_on_bit_for_bit(method: str, cut: int, tmp_path: Path) -> None:
    """After a file that lost its last bytes, too; what was lost is done again."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    path = tmp_path / "run.zo"
    options = {"sparsity": 0.5, "mask": "kept" if cut in (3, 30) else "redrawn"}
    opt = build(method, model, **options)
    opt.record_to(path)
    seen = go(opt, model, 7)
    whole = path.read_bytes()
    seen += go(opt, model, 3)[1:]
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    other = copy.deepcopy(start)
    again = build(method, other, **{**options, **({"mask": "kept"} if cut == 8 else {})})
    again.resume(path)
    assert again.mask == options["mask"]
    assert any("mask" in entry for entry in again.state.values()) == (again.mask == "kept")
    assert again.step_count < 7 or not cut
    assert_same(snapshot(other), seen[again.step_count])
    go(again, other, 7 - again.step_count)
    assert_same(snapshot(other), seen[7])
    assert_same(go(again, other, 3)[-1], seen[10])
    assert zo.Trajectory.load(path) == again.trajectory
    same_after_replay(start, path, None, seen[10])


def test_a_program_that_is_started_again_goes_on(tmp_path: Path) -> None:
    model = block_mlp(**SHAPE)
    expected = go(build("MeZO", undisturbed := copy.deepcopy(model)), undisturbed, 6)[-1]
    for steps in (2, 0, 4):
        opt = build("MeZO", other := copy.deepcopy(model))
        opt.resume(tmp_path / "run.zo", missing_ok=True)
        last = go(opt, other, steps)[-1]
    assert_same(last, expected)
    with pytest.raises(FileNotFoundError):
        build("MeZO", model).resume(tmp_path / "other.zo")


def test_options_that_differ_from_the_run_s_are_told(tmp_path: Path) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    go(build("MeZO", model, trajectory=tmp_path / "run.zo"), model, 2)
    with pytest.warns(UserWarning) as told:
        others = {
            "eps": 0.5,
            "weight_decay": 0.1,
            "perturb": "in_forward",
            "distribution": "rademacher",
            "mask": "kept",
        }
        build("MeZO", start, seed=12, directions=2, **others).resume(tmp_path / "run.zo")
    kept, changed = (str(warning.message) for warning in told)
    assert kept == (
        "resume: the run had seed 11 (not 12), directions 1 (not 2), distribution normal (not rademacher), "
        "mask redrawn (not kept); the run's are taken"
    )
    assert "eps 0.02 (not 0.5), weight_decays (0.0,) (not (0.1,)), in_place True (not False); the optim" in changed
    assert told[0].filename == __file__


@pytest.mark.parametrize("weights", ["first", "last"])
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_a_run_of_signs_goes_on_with_signs(method: str, weights: str, tmp_path: Path) -> None:
    """Also of MeZO-SVRG between two anchors, and by an optimizer that was made for normals."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build(method, model, trajectory=tmp_path / "run.zo", distribution="rademacher")
    seen = go(opt, model, 5)
    (tmp_path / "cut.zo").write_bytes((tmp_path / "run.zo").read_bytes())
    state = copy.deepcopy([model.state_dict(), opt.state_dict()])
    seen += go(opt, model, 3)[1:]
    again = build(method, other := copy.deepcopy(start))
    if weights == "last":
        other.load_state_dict(state[0])
        again.load_state_dict(state[1])
        again.resume(tmp_path / "cut.zo", weights="last")
    else:
        with pytest.warns(UserWarning, match=r"distribution rademacher \(not normal\); the run's are taken"):
            again.resume(tmp_path / "cut.zo")
    assert again.distribution == "rademacher"
    assert_same(go(again, other, 3)[-1], seen[-1])
    same_after_replay(start, tmp_path / "cut.zo", None, seen[-1])
    with pytest.raises(AttributeError):
        opt.distribution = "normal"


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("MeZOSVRG", {"distribution": "rademacher"}, r"distribution rademacher \(not normal\)"),
        ("SparseMeZO", {"mask": "kept"}, r"mask kept \(not redrawn\)"),
    ],
)
def test_what_belongs_to_a_run_is_not_mixed(method: str, options: dict[str, str], told: str, tmp_path: Path) -> None:
    """A checkpoint of another run, of normals, ends what can be replayed of a run of signs between two anchors; so does
    one of a run that redraws its masks.
    """
    start = block_mlp(**SHAPE)
    seen = go(
        build(method, model := copy.deepcopy(start), **options, trajectory=tmp_path / "run.zo"),
        model,
        4,
    )
    (tmp_path / "copy.zo").write_bytes((tmp_path / "run.zo").read_bytes())
    go(other := build(method, model := copy.deepcopy(start)), model, 4)
    opt = build(method, model := copy.deepcopy(model))
    opt.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match=told):
        opt.resume(tmp_path / "copy.zo", weights="last")
    go(opt, model, 1)
    with pytest.raises(ValueError, match="it can be replayed with upto=4"):
        zo.replay(copy.deepcopy(start), tmp_path / "copy.zo")
    same_after_replay(start, tmp_path / "copy.zo", 4, seen[4])


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    one, other = block_mlp(**SHAPE), block_mlp(**SHAPE)
    first, second = build("MeZO", one), build("MeZO", other)
    first.record_to(tmp_path / "run.zo")
    go(first, one, 2)
    second.resume(tmp_path / "run.zo")
    go(second, other, 1)
    whole = (tmp_path / "run.zo").read_bytes()
    with pytest.raises(RuntimeError, match="another process writes to the same trajectory"):
        go(first, one, 1)
    assert (tmp_path / "run.zo").read_bytes() == whole


def test_resume_refuses(saved, tmp_path: Path) -> None:
    start, path, _ = saved
    opt = build("MeZO", start)
    go(opt, start, 1)
    with pytest.raises(ValueError, match="resume: expected an optimizer that has taken no step, got one after 1"):
        opt.resume(path)
    with pytest.raises(ValueError, match="resume: expected a trajectory of LeZO, got one of MeZO"):
        build("LeZO", block_mlp(**SHAPE)).resume(path)
    with pytest.raises(ValueError, match="weights that the run started with"):
        build("MeZO", block_mlp(seed=1, **SHAPE)).resume(path)
    with pytest.raises(ValueError, match="already exists; delete it, or continue"):
        build("MeZO", block_mlp(**SHAPE), trajectory=path)
    with pytest.raises(TypeError, match="trajectory: expected a path, got int"):
        build("MeZO", block_mlp(**SHAPE), trajectory=3)
    own = tmp_path / "own.zo"
    with pytest.raises(ValueError, match=r"resume: expected an optimizer made without trajectory=.*own\.zo"):
        build("MeZO", block_mlp(**SHAPE), trajectory=own).resume(path)


@pytest.mark.parametrize("mask", ["redrawn", "kept"])
@pytest.mark.parametrize("method", METHODS)
def test_resume_from_a_checkpoint(method: str, mask: str, tmp_path: Path) -> None:
    """Weights, the optimizer's state and the file so far: nothing is replayed, the file goes on, and it is one run."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build(method, model, sparsity=0.5, mask=mask, trajectory=tmp_path / "run.zo")
    go(opt, model, 4)
    torch.save([model.state_dict(), opt.state_dict()], tmp_path / "checkpoint.pt")
    (tmp_path / "copy.zo").write_bytes((tmp_path / "run.zo").read_bytes())
    seen = go(opt, model, 4)
    other = copy.deepcopy(start)
    again = build(method, other, sparsity=0.5)
    weights, state = torch.load(tmp_path / "checkpoint.pt")
    other.load_state_dict(weights)
    with pytest.raises(ValueError, match=r"resume: expected the state .* after step 4, .*after step 0"):
        again.resume(tmp_path / "copy.zo", weights="last")
    again.load_state_dict(state)
    again.resume(tmp_path / "copy.zo", weights="last")
    assert_same(go(again, other, 4)[-1], seen[-1])
    same_after_replay(start, tmp_path / "copy.zo", None, seen[-1])
    assert zo.Trajectory.load(tmp_path / "copy.zo").steps == 8


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_that_was_interrupted_leaves_nothing_behind(times: int, tmp_path: Path) -> None:
    """In place it leaves rounding in the weights of the process, which another one that resumes need not repeat."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    undisturbed = copy.deepcopy(model)
    expected = go(build("MeZO", undisturbed), undisturbed, 6)
    opt = build("MeZO", model, trajectory=tmp_path / "run.zo")
    go(opt, model, 3)
    for _ in range(times):
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: 1 / 0)
    again = build("MeZO", other := copy.deepcopy(start))
    again.resume(tmp_path / "run.zo")
    assert_same(snapshot(other), expected[3])
    assert_same(go(again, other, 3)[-1], expected[6])
    same_after_replay(start, tmp_path / "run.zo", None, expected[6])


def test_other_weights_than_the_last_are_found_by_replaying(tmp_path: Path) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model, trajectory=tmp_path / "run.zo")
    go(opt, model, 4)
    state = opt.state_dict()
    again = build("MeZO", other := copy.deepcopy(start))
    again.load_state_dict(state)
    again.resume(tmp_path / "run.zo", weights="last")
    go(again, other, 1)
    with pytest.raises(ValueError, match="expected the weights that the run had after step 4, got other values"):
        zo.replay(start, tmp_path / "run.zo")
