"""Plain loops that are killed and started again until they are done: the bits of a run that was left alone."""

from __future__ import annotations

import inspect
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import zo_kernels as zo
from attack.points import PACKAGE
from attack.runs import RUNS, Bits, Run, bits_of, replayed
from attack.workers import Result, expect, in_child

STEPS = 30
SYNCS = ("step", "checkpoint", "never")
WAYS = ("call", "operation", "clock")
Case = tuple[str, str, str, int]

LOOPS = {
    name: replace(RUNS[name], interrupted={}, steps=STEPS, refused=(5, 17), eps_at=())
    for name in RUNS
    if name != "long"
}


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` is of loops; each is killed several times."""
    draw = random.Random(seed + 2)
    names = list(LOOPS)
    for i in range(count):
        yield names[i % len(names)], WAYS[i % 3], draw.choice(SYNCS), draw.getrandbits(32)


def loop(run: Run, path: Path, sync: str | None) -> Bits:
    """A program that goes on with its run, however often it is started."""
    model = run.model()
    options = {"sync": sync} if sync and "sync" in inspect.signature(zo.ZeroOrderOptimizer.__init__).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = run.build(model, **options)
        opt.resume(path, missing_ok=True)
        Path("resumed").write_text(str(opt.step_count))
        while opt.step_count < run.steps:
            run.attempt(opt, model)
    return bits_of(model)


@cache
def undisturbed(name: str) -> tuple[Bits, list[Any], int, float]:
    """The weights of a loop that is left alone, its records, the calls that it makes, the seconds that it takes."""
    calls = 0

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += frame.f_code.co_filename.startswith(PACKAGE)

    path = Path("undisturbed.zo")
    loop(LOOPS[name], path, None)
    path.unlink()
    began = time.monotonic()
    bits = loop(LOOPS[name], path, None)
    seconds = time.monotonic() - began
    records = steps_of(path)
    path.unlink()
    sys.settrace(trace)
    loop(LOOPS[name], path, None)
    sys.settrace(None)
    path.unlink()
    return bits, records, calls, seconds


def steps_of(path: Path) -> list[Any]:
    return [(r.step, r.kind, r.losses, r.rates, r.probes) for r in zo.Trajectory.load(path)]


def kill_at_call(number: int) -> None:
    """Of this package; the process dies."""
    left = number

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        left -= frame.f_code.co_filename.startswith(PACKAGE)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.settrace(trace)


def kill_at_operation(number: int, part: float) -> None:
    """On files: before it happens, or in the middle of a write."""
    left = number

    def dying(name: str) -> None:
        plain = getattr(os, name)

        def operation(*given: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                if name == "write" and part:
                    plain(given[0], bytes(given[1])[: int(part * len(given[1]))])
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*given, **options)

        setattr(os, name, operation)

    for name in ("open", "write", "fsync", "close", "replace", "rename", "ftruncate", "truncate", "unlink"):
        dying(name)


def kill_after(seconds: float) -> None:
    """By a thread, whatever is going on."""

    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def attempt(case: Case) -> Result:
    name, way, sync, seed = case
    draw = random.Random(seed)
    expected, records, calls, seconds = undisturbed(name)
    for file in Path().iterdir():  # of a case that failed
        file.unlink()
    path, run = Path("run.zo"), LOOPS[name]
    kills = had = 0
    for life in range(12):
        Path("resumed").unlink(missing_ok=True)
        last = life == 11

        def live(last: bool = last, draw: random.Random = draw) -> None:
            if not last:
                if way == "call":
                    kill_at_call(draw.randint(1, calls))
                elif way == "operation":
                    kill_at_operation(draw.randint(1, 4 * STEPS), draw.choice((0, 0.5, draw.random())))
                else:
                    kill_after(draw.random() * seconds)
            bits = loop(run, path, sync)
            Path("end").write_bytes(b"".join(bits))

        status = in_child(live)
        draw.random()  # the child's own draws are its own
        draw = random.Random(draw.getrandbits(32))
        if Path("resumed").exists() and (told := Path("resumed").read_text()):  # it may be killed as it writes this
            resumed = int(told)
            expect(resumed == had, f"{name}, {way}, {sync}: {had} steps were on file, {resumed} came back")
        if status == 0:
            break
        expect(status == -signal.SIGKILL, f"{name}, {way}, {sync}: life {life} ended with {status}")
        kills += 1
        now = zo.Trajectory.load(path, recover=True).steps if path.exists() and path.stat().st_size else 0
        expect(now >= had, f"{name}, {way}, {sync}: {had} steps were on file, {now} are")
        had = now
    expect(Path("end").read_bytes() == b"".join(expected), f"{name}, {way}, {sync}: other weights after {kills} kills")
    expect(steps_of(path) == records, f"{name}, {way}, {sync}: other steps in the file after {kills} kills")
    expect(replayed(run, path) == expected, f"{name}, {way}, {sync}: the file gives other weights")
    left = sorted(p.name for p in Path().iterdir() if p.name not in ("run.zo", "resumed", "end"))
    for file in Path().iterdir():
        file.unlink()
    expect(not [n for n in left if "damaged" in n], f"{name}, {way}, {sync}: a kill left {left}")
    return Result("done", tally={"kills": kills, "lives": life + 1})
