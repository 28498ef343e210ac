"""Crafted trajectories: refused by a word that names what is wrong and nothing changed, or taken in finite time."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import zo_kernels as zo
from attack import craft
from attack.runs import RUNS, Recorded, bits_of, recorded, replayed, state_of
from attack.workers import Result, expect

SMALL = [name for name in RUNS if name != "long"]
Case = tuple[str, int]


def prepare() -> None:
    for name in SMALL:
        recorded(name)


def cases(count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(seed + 1)
    for i in range(count):
        yield SMALL[i % len(SMALL)], draw.getrandbits(48)


def attempt(case: Case) -> Result:
    name, seed = case
    known = recorded(name)
    made = craft.craft(random.Random(seed), known)
    if made.data == known.data:
        return Result("the original")
    path = Path("crafted.zo")
    path.write_bytes(made.data)
    try:
        outcomes = [_tried(known, made, path, how) for how in ("load", "replay", "resume")]
    except AssertionError as wrong:
        raise type(wrong)(f"{name}, {made.what}: {wrong}") from None
    finally:
        for file in Path().iterdir():
            file.unlink()
    return Result(", ".join(dict.fromkeys(outcomes)))


def _tried(known: Recorded, made: craft.Crafted, path: Path, how: str) -> str:
    model = known.run.model()
    opt = known.run.build(model)
    before = state_of(opt)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if how == "load":
                zo.Trajectory.load(path)
            elif how == "replay":
                zo.replay(model, path)
            else:
                opt.resume(path)
    except (ValueError, TypeError) as error:
        refused: Exception | None = error
    except Exception as error:
        expect(False, f"{how} raised {type(error).__name__}: {error}"[:300])
    else:
        refused = None
    if refused is None:
        # What `load` cannot see without the weights, others must.
        expect(made.verdict != "wrong" or how == "load", f"{how} accepted it")
        if made.verdict == "same" and how != "load":
            expected = known.states[known.attempts_within(len(known.data), settled=how == "resume")]
            expect(bits_of(model) == expected, f"{how} gave other weights for the same contents")
        if how == "resume" and opt.directions < 50:
            with contextlib.suppress(ValueError):  # with another eps it may be refused
                known.run.attempt(opt, model)
            expect(bits_of(model) == replayed(known.run, path), "after another step the file gives other weights")
        return "accepted"
    expect(made.verdict != "same", f"{how} refused it: {refused}")
    expect(path.read_bytes() == made.data, f"{how} refused it, and changed the file")
    # What only the weights' values can tell is found on the way, and said.
    midway = "hold what came of the replay" in str(refused)
    expect(midway or bits_of(model) == known.states[0], f"{how} refused it, and changed weights")
    expect(state_of(opt) == before, f"{how} refused it, and changed the optimizer")
    names = [*made.fields, "a trajectory of", "changed the weights", *(n for n, _ in model.named_parameters())]
    told = str(refused).replace("_", " ")
    named = midway or any(n.replace("_", " ") in told for n in names)
    expect(named, f"{how} names none of {made.fields}: {refused}"[:400])
    expect(len(str(refused)) < 2000, f"{how} says too much: {len(str(refused))} characters")
    return "refused"
