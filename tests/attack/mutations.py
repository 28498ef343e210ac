"""Damaged trajectory files: refused with nothing changed, or taken up to where they are the run's own."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zo_kernels as zo
from attack import damage
from attack.layout import SETUP
from attack.runs import RUNS, Recorded, bits_of, recorded, replayed, state_of
from attack.workers import Result, expect

Case = tuple[str, int]  # the run, and the seed of the damage


def prepare() -> None:
    for name in RUNS:
        recorded(name)


def cases(count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(seed)
    for i in range(count):
        # The long one is for whole blocks: one case in sixteen.
        names = [name for name in RUNS if name != "long"]
        yield "long" if i % 16 == 0 else names[i % len(names)], draw.getrandbits(48)


def attempt(case: Case) -> Result:
    """One damaged file, given to all that reads it."""
    name, seed = case
    draw = random.Random(seed)
    known = recorded(name)
    other = recorded(draw.choice([n for n in RUNS if n != "long"])).data
    what, data = damage.damaged(draw, known.data, known.ends, other)
    if data == known.data or (data == other and known.run.method != RUNS[name].method):
        return Result("not damaged")
    if any(data == recorded(n).data[: len(data)] and len(data) > 8 for n in RUNS if n != name):
        return Result("another run's")
    path = Path("run.zo")
    try:
        outcome = [_read(known, data, path)]
        outcome.append(_resumed(known, data, path, again=seed % 8 == 0))
        outcome.append(_recovered(known, data, path))
    except AssertionError as wrong:
        raise type(wrong)(f"{name}, {what}: {wrong}") from None
    finally:
        for file in Path().iterdir():
            file.unlink()
    return Result(outcome[1] if outcome[1] == outcome[0] else f"{outcome[1]} (load: {outcome[0]})")


def lost_in_silence(known: Recorded, data: bytes) -> int | None:
    """How many of the file's bytes may be kept by those who drop an incomplete last record, and nothing else; None if
    that is not all that the file lacks.
    """
    same = next((i for i, (a, b) in enumerate(zip(data, known.data, strict=False)) if a != b), None)
    same = min(len(data), len(known.data)) if same is None else same
    kept = known.boundary(same)
    rest = data[kept:]
    # The beginning of a setup of another file looks like that of one's own.
    of_setup = kept >= 8 and rest[4:8] == bytes(4) and any(text.startswith(rest[12:]) for text in _setups())
    # Whatever record was there, it may have been another one, as far as its checksum was not reached.
    longest = max(known.size_at(kept), *(part.size for part in known.parts if part.kind != SETUP))
    return kept if len(rest) < longest or of_setup else None


def _setups() -> list[bytes]:
    return [part.text for name in RUNS for part in recorded(name).parts if part.kind == SETUP]


def _read(known: Recorded, data: bytes, path: Path) -> str:
    path.write_bytes(data)
    whole = data == known.data[: len(data)] and len(data) in {8, *known.ends}
    outcome = []
    for read in (lambda model: zo.Trajectory.load(path), lambda model: zo.replay(model, path)):
        model = known.run.model()
        try:
            read(model)
        except ValueError as error:
            _says_where(error)
            expect(not whole, f"load refused a sound beginning of it: {error}")
            expect(bits_of(model) == known.states[0], "replay changed weights, then refused")
            outcome.append("refused")
        else:
            expect(whole, "load or replay accepted a damaged file")
            outcome.append("accepted")
        expect(path.read_bytes() == data, "load or replay changed the file")
    if whole:
        expect(bits_of(model) == known.states[known.attempts_within(len(data))], "replay gave wrong weights")
    return outcome[0]


def _says_where(error: BaseException) -> None:
    expect(bool(re.search(r"byte|begins with|no bytes|empty", str(error))), f"no place named: {error}")


def _resumed(known: Recorded, data: bytes, path: Path, *, again: bool) -> str:
    path.write_bytes(data)
    model = known.run.model()
    opt = known.run.build(model)
    before = state_of(opt)
    allowed = lost_in_silence(known, data)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            opt.resume(path)
    except ValueError as error:
        _says_where(error)
        expect(path.read_bytes() == data, "resume refused the file, and changed it")
        expect(bits_of(model) == known.states[0], "resume refused the file, and changed weights")
        expect(state_of(opt) == before, "resume refused the file, and changed the optimizer")
        expect(opt.trajectory_path is None, "resume refused the file, and writes to it")
        expect(sorted(p.name for p in Path().iterdir()) == [path.name], "resume refused the file, and left others")
        # What a killed process leaves, and nothing else, is to be taken up.
        torn = data == known.data[: len(data)] or data == known.data
        expect(not torn, f"resume refused what a killed process leaves: {error}")
        return "refused"
    expect(allowed is not None, f"resume dropped damage in silence: {len(data)} bytes, {opt.step_count} steps left")
    assert allowed is not None
    _went_on(known, path, model, opt, allowed, again)
    expect(not [w for w in told if "damaged" in str(w.message)], "resume warned of damage, and took the file")
    return "accepted"


def _went_on(known: Recorded, path: Path, model: Any, opt: Any, size: int, again: bool) -> None:
    """That a resumed run is where the file's first bytes end."""
    attempts = known.attempts_within(size, settled=True)
    expect(opt.step_count == known.counts[attempts], f"{opt.step_count} steps for {known.counts[attempts]}")
    expect(bits_of(model) == known.states[attempts], "resume gave wrong weights")
    now = path.read_bytes()
    settled = known.data[: known.settled_boundary(size)]
    expect(now in (known.data[:size], settled) or not size, f"the file has {len(now)} bytes for {size}")
    if again:
        known.run.attempt(opt, model)
        expect(bits_of(model) == replayed(known.run, path), "after another step the file gives other weights")
        expect(path.read_bytes() == opt.trajectory.to_bytes(), "after another step the file is not the trajectory")


def _recovered(known: Recorded, data: bytes, path: Path) -> str:
    for file in Path().iterdir():
        file.unlink()
    path.write_bytes(data)
    model = known.run.model()
    opt = known.run.build(model)
    before = state_of(opt)
    others = [recorded(name) for name in RUNS if recorded(name) is not known]
    foreign = data[:8] != known.data[: min(8, len(data))]
    foreign |= any(data[: other.ends[0]] == other.data[: other.ends[0]] for other in others)  # by its first setup
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            opt.resume(path, recover=True)
        except ValueError as error:
            expect(path.read_bytes() == data and state_of(opt) == before, "recover refused it, and changed something")
            expect(bits_of(model) == known.states[0], "recover refused it, and changed weights")
            expect(foreign, f"recover refused a file of ours: {error}")
            return "refused"
    same = next((i for i, (a, b) in enumerate(zip(data, known.data, strict=False)) if a != b), None)
    kept = known.boundary(min(len(data), len(known.data)) if same is None else same)
    moved = sorted(Path().glob("run.zo.damaged-*"))
    rest = moved[0].read_bytes() if moved else b""
    _went_on(known, path, model, opt, kept, False)
    if allowed := lost_in_silence(known, data) is None:
        expect(len(moved) == 1, f"recover moved the rest to {[p.name for p in moved]}")
        expect(any("damaged" in str(w.message) for w in told), "recover said nothing")
    expect(not moved or path.read_bytes() + rest in _same_but_interrupted(known, kept, data), "recover lost bytes")
    return "recovered" if allowed else "nothing to recover"


def _same_but_interrupted(known: Recorded, kept: int, data: bytes) -> set[bytes]:
    """The file, without the interrupted steps at the end of what was kept, too: a resumed run does not repeat them."""
    return {data, data[: known.settled_boundary(kept)] + data[kept:]}
