"""Crafted tables and passes: refused, or they change what they say and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from attack.workers import Result, expect
from zo_kernels import ops
from zo_kernels.backends.types import Entry, MaskKind, Pass

_native: Any
try:
    from zo_kernels import _native  # type: ignore[attr-defined, no-redef]
except ImportError:
    _native = None

N, GUARD = 64, 256
NASTY = [
    -(2**63),
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    3,
    5,
    7,
    255,
    1000,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
]
Case = tuple[str, int]


def cases(count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(seed + 7)
    for i in range(count):
        yield ("native", "ops")[i % 2], draw.getrandbits(48)


def attempt(case: Case) -> Result:
    what, seed = case
    return (_crafted_native if what == "native" else _crafted_ops)(random.Random(seed))


class Arena:
    """Memory with guards around what may be changed."""

    def __init__(self, count: int, dtype: torch.dtype):
        self.all = torch.full((count * (N + 2 * GUARD),), 3.0, dtype=dtype)
        self.parts = [p[GUARD : GUARD + N] for p in self.all.view(count, -1)]
        self.before = self.all.clone()

    def guards_hold(self) -> bool:
        now, before = (t.view(len(self.parts), -1) for t in (self.all, self.before))
        return torch.equal(now[:, :GUARD], before[:, :GUARD]) and torch.equal(now[:, -GUARD:], before[:, -GUARD:])

    def untouched(self) -> bool:
        return torch.equal(self.all, self.before)


def _crafted_native(draw: random.Random) -> Result:
    if _native is None:
        return Result("not built")
    count, groups, directions = draw.randint(1, 3), draw.randint(1, 2), draw.randint(1, 3)
    arena, masks = Arena(count, torch.float32), torch.zeros(count, N, dtype=torch.uint8)
    entries: list[list[Any]] = []
    for i, part in enumerate(arena.parts):
        kind, at = draw.randrange(5), part.data_ptr()
        mask = masks[i].data_ptr() if kind >= 2 else 0
        sizes = [4 * N, 4 * N, N if mask else 0]
        entries.append([at, at, N, 0, i, draw.randrange(groups), 0, kind, 1.0, mask, *sizes])
    seeds: list[Any] = [draw.getrandbits(64) for _ in range(directions)]
    scales, decays = [0.5] * (groups * directions), [1.0] * groups
    active: Any = draw.choice((None, list(range(count))))
    threads, stochastic, chosen = 1, False, "scalar"
    distribution: Any = draw.randrange(2)
    how = draw.choice(
        ("entry", "entry", "scales", "decays", "seeds", "active", "threads", "distribution", "set", "nothing")
    )
    wrong = True
    if how == "entry":
        entry = draw.choice(entries)
        place = draw.randrange(2, 13)
        value: Any = draw.choice([*NASTY, None, "x", float("nan"), float("inf")])
        if place == 9:
            entry[7], value = draw.choice((2, 3, 4)), 0
        entry[place] = value
        wrong = not _fits(entry, groups)
        how = f"entry[{place}] {value}"
    elif how in ("scales", "decays", "seeds"):
        target = {"scales": scales, "decays": decays, "seeds": seeds}[how]
        change = draw.choice(("longer", "shorter", "empty", "much"))
        if change == "longer":
            target.append(target[0])
        elif change == "shorter":
            target.pop()
        elif change == "empty":
            target.clear()
        else:
            target.extend(target * 1000)
        if how == "decays":  # how many groups there are is what these say
            wrong = len(target) * directions != len(scales)
        how = f"{how} {change}"
    elif how == "active":
        value = draw.choice(NASTY)
        active = [value]
        wrong = not 0 <= value < count
    elif how == "threads":
        threads, wrong = draw.choice((0, -1, 2**31 - 1, -(2**31), 2**40, 5)), False
    elif how == "distribution":
        distribution = draw.choice([n for n in [*NASTY, None, "x", 1.5] if n not in (0, 1)])
    elif how == "set":
        chosen = draw.choice(("", "none", "avx9999", "x" * 10**6))
    else:
        wrong = False
    told = f"native: {how}"
    try:
        table = _native.Table([tuple(entry) for entry in entries])
        table.run(seeds, scales, decays, distribution, stochastic, active, threads, chosen)
    except (ValueError, TypeError, IndexError, OverflowError):
        expect(wrong or how == "threads", f"{told}: refused what is right")
        expect(arena.untouched(), f"{told}: refused, and memory changed")
        return Result("refused")
    expect(arena.guards_hold(), f"{told}: wrote beyond its memory")
    expect(not wrong, f"{told}: accepted")
    return Result("accepted")


def _fits(entry: list[Any], groups: int) -> bool:
    """Whether a table may have it: addresses, elements, offset, id, group, dtype, mask, threshold, mask, bytes."""
    _, _, n, offset, name, group, dtype, mask, threshold, mask_at, *rooms = entry
    if not all(isinstance(x, int) for x in (n, offset, name, group, dtype, mask, mask_at, *rooms)):
        return False
    if not isinstance(threshold, int | float) or not all(-(2**63) <= x < 2**63 for x in (n, offset, *rooms)):
        return False
    if not (n >= 0 and 0 <= offset <= 2**63 - 1 - n and 0 <= name < 2**32 and 0 <= group < groups):
        return False
    if dtype not in (0, 1, 2) or mask not in range(5):
        return False
    bytes_of_mask = {2: n, 3: -(-n // 8), 4: -(-n // 8)}.get(mask, 0)
    enough = min(rooms[:2]) >= n * (4 if dtype == 0 else 2) and rooms[2] >= bytes_of_mask
    return not n or (enough and (mask_at != 0 or not bytes_of_mask))


def _crafted_ops(draw: random.Random) -> Result:
    count, groups, directions = draw.randint(1, 3), draw.randint(1, 2), draw.randint(1, 3)
    arena = Arena(count, draw.choice((torch.float32, torch.bfloat16)))
    entries = [Entry(p, p, i, group=draw.randrange(groups)) for i, p in enumerate(arena.parts)]
    seeds: Any = [draw.getrandbits(64) for _ in range(directions)]
    scales: Any = [[0.5] * directions for _ in range(groups)]
    decays: Any = [1.0] * groups
    active: Any = None
    at = draw.randrange(count)
    e = entries[at]
    other: Any = draw.choice(
        (torch.zeros(N - 1), torch.zeros(0), torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.int32),
         torch.zeros(2 * N)[::2], torch.zeros(N, device="meta"), torch.zeros(1).expand(N), None, 3)
    )  # fmt: skip
    nasty: Any = draw.choice([n for n in [*NASTY, None, "x", 1.5] if not isinstance(n, int) or not 0 <= n < groups])

    def entry(**change: Any) -> Entry:
        given = {name: getattr(e, name) for name in Entry.__slots__}
        return Entry(**{**given, **change})

    distribution: Any = draw.choice(("normal", "rademacher"))
    how = draw.choice(("src", "dst", "group", "id", "offset", "mask", "no mask", "active", "scales", "decays", "seeds",
                       "distribution"))  # fmt: skip
    wrong = True
    if how == "src":
        entries[at] = entry(src=other)
    elif how == "dst":
        entries[at] = entry(dst=other)
    elif how == "group":
        entries[at] = entry(group=nasty)
    elif how == "id":
        value = draw.choice([-1, 2**32, 2**64, None, "x", 1.5])
        entries[at] = entry(param_id=value)
    elif how == "offset":
        entries[at] = entry(offset=draw.choice([-1, -(2**63), 2**63 - 1, 2**64, None, "x", 1.5]))
    elif how == "mask":
        kind = draw.choice((MaskKind.BOOL, MaskKind.BITS, MaskKind.RECORD))
        mask = draw.choice((torch.zeros(0, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool), torch.zeros(N), None))
        entries[at] = entry(mask=kind, mask_tensor=mask)
    elif how == "no mask":
        entries[at] = entry(mask=draw.choice((7, -1, 2**31, None)))
    elif how == "active":
        active = [draw.choice([n for n in NASTY if not 0 <= n < count])]
    elif how == "scales":
        scales = draw.choice(([], [[]], [[0.5] * (directions + 1)] * groups, [[0.5] * directions] * (groups - 1)))
    elif how == "decays":
        decays = draw.choice(([], [1.0] * (groups - 1), [None] * groups, ["x"] * groups))
    elif how == "distribution":
        distribution = draw.choice(("", "Normal", "cauchy", 0, 1, None, 1.5))
    else:
        seeds = draw.choice((seeds * 2, seeds[:-1], [-1] * directions, [2**64] * directions, ["x"] * directions))
        wrong = seeds[0:1] not in ([-1], [2**64])  # as for any pass, their bits count
    told = f"ops: {how}"
    try:
        ops.Table(entries, [f"t{i}" for i in range(count)]).apply(
            Pass(seeds, scales, decays, False, active, distribution)
        )
    except (ValueError, TypeError, IndexError, OverflowError, AttributeError, NotImplementedError):
        expect(arena.untouched(), f"{told}: refused, and memory changed")
        return Result("refused")
    expect(arena.guards_hold(), f"{told}: wrote beyond its memory")
    expect(not wrong, f"{told}: accepted")
    return Result("accepted")
