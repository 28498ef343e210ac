"""`resume` never destroys what it cannot read, and a run's file is written by one process, and whole."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted import ends, records, sealed, setup_of, setup_record
from models import block_mlp
from scripted import assert_same, snapshot
from small_runs import SHAPE, build, go, same_after_replay
from torch import nn

import zo_kernels as zo
from zo_kernels import files
from zo_kernels.runs.replay import Replay
from zo_kernels.trajectory import FaultyTrajectory
from zo_kernels.trajectory.recorder import TrajectoryFile

POSIX = pytest.mark.skipif(os.name != "posix", reason="this system has no fork")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def newer(data: bytes) -> bytes:
    parts = records(data)
    return sealed([*parts[:3], setup_record({**setup_of(parts[0]), "more": 1}), *parts[3:]])


# Of a run of 5 steps: what is done to its file, the steps that are kept, and how many are told to be gone.
FAULTS: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "a bit of the setup": (lambda data: flipped(data, 100), 0, "lost 5 steps"),
    "a bit of the third step": (lambda data: flipped(data, ends(data)[3] + 20), 2, "lost 3 steps"),
    "a bit of the last step": (lambda data: flipped(data, len(data) - 1), 4, "lost 1 steps"),
    "bytes left out": (lambda data: data[: (at := ends(data)[3] + 5)] + data[at + 4 :], 2, "lost about 3 steps"),
    "zeros": (lambda data: data + bytes(100), 5, "lost about 4 steps"),
    "a newer version": (newer, 2, "lost 3 steps"),
    "the first bytes": (lambda data: flipped(data, 3), 0, "lost 5 steps"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
@pytest.mark.parametrize("what", FAULTS)
def test_resume_gives_up_nothing_unasked(what: str, method: str, tmp_path: Path) -> None:
    model, path = block_mlp(**SHAPE), tmp_path / "run.zo"
    start = copy.deepcopy(model)
    whole = build(method, model, trajectory=path)
    seen = go(whole, model, 5)
    del whole
    damage, kept, told = FAULTS[what]
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    opt = build(method, other := copy.deepcopy(start))
    with pytest.raises(FaultyTrajectory, match=r"run\.zo: record \d+, at byte \d+: .*recover=True"):
        opt.resume(path)
    assert path.read_bytes() == damaged and os.listdir(tmp_path) == ["run.zo"]
    assert_same(snapshot(other), seen[0])
    assert opt.step_count == 0 and opt.trajectory_path is None
    with pytest.warns(
        UserWarning, match=rf"the run {told} and continues after step {kept}; .* in .*run\.zo\.damaged-1$"
    ) as warned:
        opt.resume(path, recover=True)
    assert warned[0].filename == __file__
    assert_same(snapshot(other), seen[kept])
    assert_same(go(opt, other, 5 - kept)[-1], seen[5])
    same_after_replay(start, path, None, seen[5])
    rest = (tmp_path / "run.zo.damaged-1").read_bytes()
    assert damaged.endswith(rest) and path.read_bytes().startswith(damaged[: len(damaged) - len(rest)])


def test_files_that_are_not_ours_are_refused_in_any_case(saved, tmp_path: Path) -> None:
    start, path, _ = saved
    parts = records(path.read_bytes())
    first_newer = sealed([setup_record({**setup_of(parts[0]), "more": 1}), *parts[1:]])
    for data in (first_newer, b"ZOTRAJ2\n" + path.read_bytes()[8:200], b"not at all"):
        path.write_bytes(data)
        opt = build("MeZO", start)
        with pytest.raises(FaultyTrajectory):
            opt.resume(path, recover=True)
        assert path.read_bytes() == data and os.listdir(tmp_path) == ["run.zo"] and opt.step_count == 0
    with pytest.raises(TypeError, match="recover: expected a bool, got int"):
        opt.resume(path, recover=1)
    with pytest.raises(ValueError, match="sync: expected one of"):
        build("MeZO", start, sync="always")


@pytest.mark.parametrize("fails", ["write", "fsync", "the weights", "the replay", "the cut"])
def test_a_recovery_that_fails_changes_nothing(saved, fails: str, tmp_path: Path, monkeypatch: Any) -> None:
    start, path, _ = saved
    damaged = flipped(path.read_bytes(), ends(path.read_bytes())[3] + 20)
    path.write_bytes(damaged)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = block_mlp(seed=1, **SHAPE) if fails == "the weights" else start
    before = snapshot(model)
    opt = build("MeZO", model)
    with monkeypatch.context() as patched:
        if fails == "write":
            patched.setattr(files, "replace", full)
        if fails == "fsync":
            patched.setattr(os, "fsync", full)
        if fails == "the replay":
            patched.setattr(Replay, "run", full)
        if fails == "the cut":
            patched.setattr(os, "ftruncate", full)
        with pytest.raises((OSError, ValueError), match=r"No space|weights that the run started with"):
            opt.resume(path, recover=True)
    assert path.read_bytes() == damaged
    if fails != "the cut":
        assert os.listdir(tmp_path) == ["run.zo"]
        assert_same(snapshot(model), before)
        assert opt.step_count == 0


def test_files_that_cannot_be_written_are_told_before_anything_changes(saved, monkeypatch: Any, tmp_path: Path) -> None:
    start, path, seen = saved
    real = os.open

    def read_only(path: Any, flags: int, *more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(PermissionError):
            build("MeZO", start).resume(path)
    assert_same(snapshot(start), seen[0])
    missing = tmp_path / "no" / "run.zo"
    for make in (
        lambda: build("MeZO", start, trajectory=missing),
        lambda: build("MeZO", start).record_to(missing),
        lambda: build("MeZO", start).resume(missing, missing_ok=True),
    ):
        with pytest.raises(ValueError, match=r"trajectory: expected a file in an existing folder, .*create .*/no"):
            make()


def forked(do: Callable[[], Any]) -> int:
    """0, or if it raised 3 because it was forked, 2 because somebody else writes, else 1."""
    child = os.fork()
    if child == 0:
        try:
            with warnings.catch_warnings():
                do()
        except BaseException as error:
            told = "is a fork of it" in str(error), isinstance(error, (BlockingIOError, RuntimeError)), True
            os._exit(3 - told.index(True))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@POSIX
def test_another_process_writes_nothing(tmp_path: Path) -> None:
    """One that was forked off, or one that resumes the file while it is written."""
    model, path = block_mlp(**SHAPE), tmp_path / "run.zo"
    start = copy.deepcopy(model)
    opt = build("MeZO", model, trajectory=path)
    go(opt, model, 2)
    whole = opt.trajectory.to_bytes()  # to read the file would give its lock up until the next step
    resuming = build("MeZO", start)
    assert forked(lambda opt=opt: go(opt, model, 1)) == 3  # steps were taken in vain, and it says so
    assert forked(lambda: resuming.resume(path)) == 2
    assert path.read_bytes() == whole
    go(opt, model, 1)
    assert zo.Trajectory.load(path) == opt.trajectory
    del opt
    assert forked(lambda: resuming.resume(path)) == 0


@POSIX
def test_a_lock_that_was_lost_is_noticed(tmp_path: Path) -> None:
    model, path = block_mlp(**SHAPE), tmp_path / "run.zo"
    opt = build("MeZO", model, trajectory=path)
    go(opt, model, 1)
    path.read_bytes()  # which gives up this process's lock
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = TrajectoryFile(path, new=False)
        os.write(tell, b"x")
        signal.pause()
        held.close()
    os.read(told, 1)
    try:
        with pytest.raises(RuntimeError, match="another process writes to the same trajectory, and has locked it"):
            go(opt, model, 1)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    go(opt, model, 1)
    assert zo.Trajectory.load(path).steps == 3


def test_a_write_that_was_not_noted_is_our_own(tmp_path: Path, monkeypatch: Any) -> None:
    model, path = block_mlp(**SHAPE), tmp_path / "run.zo"
    start = copy.deepcopy(model)
    opt = build("MeZO", model, trajectory=path)
    go(opt, model, 1)
    append = TrajectoryFile.append
    for part in (24, 7):
        with monkeypatch.context() as patched:

            def interrupted(self: TrajectoryFile, data: bytes, part: int = part) -> int:
                append(self, data[:part])
                raise KeyboardInterrupt

            patched.setattr(TrajectoryFile, "append", interrupted)
            with pytest.raises(KeyboardInterrupt):
                go(opt, model, 1)
        final = go(opt, model, 1)[-1]
    assert zo.Trajectory.load(path) == opt.trajectory and opt.step_count == 5
    same_after_replay(start, path, None, final)


@pytest.mark.parametrize("change", ["deleted", "replaced", "moved", "shorter", "longer"])
def test_a_file_that_others_changed_is_told(change: str, tmp_path: Path) -> None:
    model, path = block_mlp(**SHAPE), tmp_path / "run.zo"
    start = copy.deepcopy(model)
    opt = build("MeZO", model, trajectory=path)
    go(opt, model, 2)
    match change:
        case "deleted":
            path.unlink()
        case "replaced":
            shutil.copy(path, tmp_path / "copy")
            os.replace(tmp_path / "copy", path)
        case "moved":
            path.rename(tmp_path / "other")
        case "shorter":
            os.truncate(path, 100)
        case "longer":
            path.write_bytes(path.read_bytes() + b"x")
    wanted = "deleted or moved" if change in ("deleted", "replaced", "moved") else "another process writes to the same"
    there = path.read_bytes() if path.exists() else None
    with pytest.raises(RuntimeError, match=wanted):
        go(opt, model, 1)
    assert (path.read_bytes() if path.exists() else None) == there
    opt.record_to(tmp_path / "again.zo")
    final = go(opt, model, 1)[-1]
    same_after_replay(start, tmp_path / "again.zo", None, final)


def test_the_file_is_forced_to_the_disk_when_it_was_asked(tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file))[1])
    counts = {}
    for sync in ("step", "checkpoint", "never"):
        (tmp_path / sync).mkdir()
        path, model = tmp_path / sync / "run.zo", nn.Linear(2, 2)
        opt = zo.MeZO(model, lr=1e-3, trajectory=path, sync=sync)

        def of_it(where: Path = path) -> int:
            return synced.count(where.stat().st_ino)

        found = []
        for do in (
            lambda opt=opt, model=model: [opt.step(lambda: model(torch.ones(1, 2)).sum()) for _ in range(2)],
            lambda opt=opt: opt.state_dict(),
        ):
            do()
            found.append(of_it())
        found.append(of_it(path.parent))
        del opt, do
        found.append(of_it())
        counts[sync] = found
        again = zo.MeZO(nn.Linear(2, 2), lr=1e-3, sync=sync)
        again.load_state_dict({**again.state_dict(), "zo": {**again.state_dict()["zo"], "step_count": 2}})
        again.resume(path, weights="last")
        again.state_dict()
        counts[sync].append(of_it() - found[-1])
    assert counts == {"step": [3, 4, 1, 5, 2], "checkpoint": [0, 1, 1, 2, 2], "never": [0, 0, 0, 0, 0]}


def test_a_full_disk_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model, trajectory=tmp_path / "run.zo")
    go(opt, model, 1)
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 5:
            return write(file, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            go(opt, model, 1)
    assert opt.step_count == 2
    final = go(opt, model, 1)[-1]
    same_after_replay(start, tmp_path / "run.zo", None, final)
