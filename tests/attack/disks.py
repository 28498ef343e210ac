"""Full disks wherever something is written: a clear error, nothing lost, and the same end once there is space."""

from __future__ import annotations

import errno
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import zo_kernels as zo
from attack import run_kills
from attack.full import Failing, filled, full_disk, mounted, why_no_mount
from attack.kills import LOOPS, loop, steps_of, undisturbed
from attack.runs import bits_of, recorded, replayed
from attack.workers import Result, expect, in_child

Case = tuple[str, int, int]
prepare = run_kills.prepare


def cases(count: int, seed: int) -> Iterator[Case]:
    """Of what is written in this process: each operation in turn."""
    draw = random.Random(seed + 4)
    for i in range(count):
        yield ("trajectory", "trajectory", "save", "recover")[i % 4], i // 4, draw.getrandbits(32)


def cases_of_runs(count: int, seed: int) -> Iterator[Case]:
    """Of zo-finetune and ZOTrainer, on a small disk."""
    draw = random.Random(seed + 5)
    for i in range(count):
        yield ("zo-finetune", "trainer", "sweep")[i % 3], i // 3, draw.getrandbits(32)


def attempt(case: Case) -> Result:
    what, number, seed = case
    for file in Path().iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return {"trajectory": _trajectory, "save": _save, "recover": _recover}[what](number, random.Random(seed))


def _is_full(error: OSError) -> None:
    expect(error.errno == errno.ENOSPC and "space" in str(error).lower(), f"the error says {error!r}")


def _trajectory(number: int, draw: random.Random) -> Result:
    name = list(LOOPS)[number % len(LOOPS)]
    run, path = LOOPS[name], Path("run.zo")
    expected, records = undisturbed(name)[:2]
    disk = Failing(1 + number % 40, once=draw.random() < 0.3, part=draw.choice((0, 0.3, 0.9)))
    model = run.model()
    failures = 0
    with warnings.catch_warnings(), full_disk(disk):
        warnings.simplefilter("ignore")
        while True:
            try:
                opt = run.build(model, trajectory=path)
                break
            except OSError as error:
                _is_full(error)
                expect(bits_of(model) == bits_of(run.model()), f"{name}: it was not made, and weights changed")
                disk.free = True
        copied: list[bytes] = []
        while opt.step_count < run.steps:
            try:
                run.attempt(opt, model)
            except OSError as error:
                failures += 1
                _is_full(error)
                expect(bits_of(model) == replayed(run, opt.trajectory), f"{name}: the weights are not the trajectory's")
                copied.append(path.read_bytes() if path.exists() else b"")
                disk.free = failures >= 3
    told = f"{name}, operation {disk.at} failed ({failures} errors)"
    expect(bits_of(model) == expected, f"{told}: other weights at the end")
    if path.read_bytes() != opt.trajectory.to_bytes():  # the last step's error: the next one writes it
        expect(failures > 0, f"{told}: nobody was told")
        expect(len(copied) == failures, told)
    else:
        expect(steps_of(path) == records, f"{told}: other steps in the file")
        expect(replayed(run, path) == expected, f"{told}: the file gives other weights")
    for data in copied[:2]:  # a process that ended with its error, and was started again
        path.unlink(missing_ok=True)
        if data:
            path.write_bytes(data)
        expect(loop(run, path, None) == expected, f"{told}: resumed, it ends with other weights")
        expect(steps_of(path) == records, f"{told}: resumed, its file has other steps")
    return Result("told" if failures else "unharmed")


def _save(number: int, draw: random.Random) -> Result:
    old, new = recorded("plain"), recorded("svrg")
    path = Path("saved.zo")
    path.write_bytes(old.data)
    trajectory = zo.Trajectory.from_bytes(new.data)
    disk = Failing(1 + number % 6)
    try:
        with full_disk(disk):
            trajectory.save(path)
    except OSError as error:
        _is_full(error)
        # All of the new one may be there if only the folder's name of it could not be forced to the disk.
        expect(path.read_bytes() in (old.data, new.data), "save failed, and the old file is gone")
        expect(len(os.listdir()) == 1, f"save failed, and left {os.listdir()}")
        trajectory.save(path)
        expect(path.read_bytes() == new.data, "saved again, it is another")
        return Result("told")
    expect(path.read_bytes() == new.data, "saved, and it is another")
    expect(not disk.failed, "save failed without a word")
    return Result("unharmed")


def _recover(number: int, draw: random.Random) -> Result:
    known = recorded("plain")
    data = bytearray(known.data)
    data[known.ends[4] + 9] ^= 255
    path = Path("run.zo")
    path.write_bytes(data)
    disk = Failing(1 + number % 12, part=draw.choice((0, 0.5)))
    model = known.run.model()
    opt = known.run.build(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with full_disk(disk):
                opt.resume(path, recover=True)
        except OSError as error:
            _is_full(error)
            moved = next(iter(sorted(Path().glob("run.zo.damaged-*"))), None)
            kept = path.read_bytes()
            rest = moved.read_bytes() if moved else b""
            # An interrupted step at the end of what is kept is not repeated by a run that resumes.
            settled = bytes(data[: known.settled_boundary(known.ends[4])] + data[known.ends[4] :])
            safe = kept == data or kept + rest in (bytes(data), settled)
            expect(safe, f"recover failed, and {len(data)} bytes became {len(kept)} and {len(rest)}")
            model = known.run.model()
            opt = known.run.build(model)
            opt.resume(path, recover=True)
            expect(opt.step_count == known.counts[known.attempts_within(known.ends[4], settled=True)], "fewer steps")
            return Result("told")
    expect(not disk.failed or disk.part > 0, "recover failed without a word")
    return Result("unharmed")


@cache
def _sizes(what: str, name: str) -> tuple[Any, int]:
    """What a run comes to that has all the space, and the pages that it needs."""
    expected, _ = _whole(what, name)
    with mounted(Path("small").absolute(), 8192) as disk:
        before = os.statvfs(disk).f_bavail
        expect(in_child(run_kills._quiet(lambda: _do(what, disk / "run", name)), 120) == 0, "it cannot run")
        return expected, before - os.statvfs(disk).f_bavail


@cache
def _whole(what: str, name: str) -> tuple[Any, float]:
    if what != "sweep":
        return run_kills.undisturbed(what, name)
    out = Path("whole sweep").absolute()
    expect(in_child(run_kills._quiet(lambda: _do(what, out, name)), 120) == 0, "the sweep cannot run")
    return _outcome(what, out), 0.0


def _do(what: str, out: Path, name: str) -> None:
    """As a user would; the commands' own status."""
    if what == "trainer":
        run_kills.train(out, name)
        return
    from zo_kernels.finetune import cli
    from zo_kernels.finetune.runs import report

    report.draw_curves = lambda records, path: None  # takes longer than all the rest
    known = run_kills.options(name)
    if what == "sweep":
        words = ["sweep", "--lr", "1e-5,1e-4"]
        begun = (out / "sweep.json").exists()
    else:
        words, begun = [], (out / "config.json").exists() and (out / "trajectory.zo").exists()
        if (out / "model" / "labels.json").exists():
            return
    if begun:
        words = [*words[:1], "--resume", str(out)]
    else:
        for key, value in known.items():
            words += ["--" + key.replace("_", "-"), str(value)]
        words += ["--out", str(out), *(["--overwrite"] if out.exists() and any(out.iterdir()) else [])]
    if status := cli.main(words):
        raise SystemExit(status)


def _outcome(what: str, out: Path) -> Any:
    if what != "sweep":
        return run_kills.outcome_of(what, out)
    files = sorted([*out.rglob("*.safetensors"), *out.rglob("sweep.csv")])
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def attempt_run(case: Case) -> Result:
    what, number, seed = case
    if why := why_no_mount():
        return Result(f"skipped: {why}")
    names = list(run_kills.TRAINED) if what == "trainer" else ["mezo", "mezo-svrg"]
    name = names[number % len(names)] if what != "sweep" else "mezo"
    run_kills.options("mezo")
    expected, pages = _sizes(what, name)
    left = int(random.Random(seed).random() * (pages + 1)) * os.sysconf("SC_PAGE_SIZE")
    told = f"{what}, {name}, {left} of {pages * 4096} bytes"
    with mounted(Path("small").absolute(), 8192) as disk:
        out = disk / "run"
        filler = filled(disk, left)
        status = in_child(run_kills._quiet(lambda: _do(what, out, name)), 120)
        said = Path("err.txt").read_text(errors="replace")
        expect(status in range(256), f"{told}: it ended with {status}")
        filler.unlink()
        if status and what != "trainer":
            lines = said.strip().splitlines()
            expect("Traceback" not in said, f"{told}: a traceback: {lines[-1:]}")
            expect("space" in said.lower(), f"{told}: it does not say that the disk is full: {lines[-2:]}")
        again = in_child(run_kills._quiet(lambda: _do(what, out, name)), 120) if status else 0
        said = Path("err.txt").read_text(errors="replace")[-400:]
        expect(again == 0, f"{told}: with space again it ends with {again}: {said}")
        expect(_outcome(what, out) == expected, f"{told}: with space again it ends with other weights")
    return Result(f"{what}, {'told' if status else 'unharmed'}")
