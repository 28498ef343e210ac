"""Damaged states: `load_state_dict` takes all of one or leaves the optimizer as it was."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from attack.runs import RUNS, bits_of, state_of
from attack.workers import Result, expect

SMALL = [name for name in RUNS if name != "long"]
NASTY: list[Any] = [
    None, True, -1, 0, 3, 1.5, 2**31, 2**63, 2**64, 2**70, float("nan"), float("inf"), -1.0, "", "x",
    "normal", "rademacher", [], [1], [[]],
    [[1, 2]], {}, {"a": 1}, (), b"x", torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), object(),
]  # fmt: skip
Case = tuple[str, int]


def cases(count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(seed + 6)
    for i in range(count):
        yield SMALL[i % len(SMALL)], draw.getrandbits(48)


@cache
def _known(name: str) -> tuple[Any, Any]:
    """The weights and the state after five steps."""
    run = RUNS[name]
    model = run.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = run.build(model)
        for _ in range(5):
            run.attempt(opt, model)
    return copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in it."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from _places(value[i], (*at, i))


def _damage(draw: random.Random, state: Any) -> str:
    at = draw.choice(list(_places(state)))
    inside = state
    for key in at[:-1]:
        inside = inside[key]
    how = draw.choice(("change", "change", "change", "remove", "longer", "shorter"))
    value = inside[at[-1]]
    if how == "remove":
        del inside[at[-1]]
    elif how == "longer" and isinstance(value, list):
        value.append(copy.deepcopy(draw.choice([*value, None, 0])))
    elif how == "shorter" and isinstance(value, list) and value:
        value.pop()
    elif how == "longer" and isinstance(value, dict):
        value[draw.choice(("x", 10**6))] = draw.choice(NASTY)
    else:
        how, inside[at[-1]] = "change", draw.choice(NASTY)
        return f"{at} to {str(inside[at[-1]])[:30]}"
    return f"{at} {how}"


def attempt(case: Case) -> Result:
    name, seed = case
    weights, state = _known(name)
    run, draw = RUNS[name], random.Random(seed)
    damaged = copy.deepcopy(state)
    what = _damage(draw, damaged)
    model = run.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = run.build(model)
        run.attempt(opt, model)
        before, bits = _all_of(opt), bits_of(model)
        try:
            opt.load_state_dict(damaged)
        except (ValueError, TypeError, KeyError) as error:
            told = f"{name}, {what}: refused ({type(error).__name__}: {error})"
            expect(not isinstance(error, KeyError), f"{told}: a KeyError names nothing")
            expect(_all_of(opt) == before, f"{told}, and the optimizer changed")
            expect(bits_of(model) == bits, f"{told}, and weights changed")
            run.attempt(opt, model)
            return Result("refused")
        model.load_state_dict(weights)
        try:
            for _ in range(4 if opt.directions < 50 else 0):
                run.attempt(opt, model)
        except Exception as error:
            if what.startswith("('param_groups'"):  # the options, which every step looks at
                return Result("refused by the step")
            expect("finite" in str(error) or "eps" in str(error), f"{name}, {what}: accepted, then {error!r}"[:300])
    return Result("accepted")


def _all_of(opt: Any) -> str:
    """Tensors by their bits, too."""
    anchors = [
        t.detach().view(torch.uint8).tolist() if isinstance(t, torch.Tensor) and t.dim() else repr(t)
        for s in opt.state.values()
        for t in (s.values() if isinstance(s, dict) else [s])
    ]
    return state_of(opt) + repr(anchors)
