"""Trajectories made by hand: their records taken apart, changed, and sealed with checksums that are right."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from models import block_mlp, real_loss
from scripted import take_step
from small_runs import SHAPE, build, go

import zo_kernels as zo
from zo_kernels.trajectory.record import MAGIC


def a_run(method: str = "MeZO", *, groups: bool = False, directions: int = 1, double: bool = False) -> bytes:
    """Of 9 steps, with every kind of record that the method has but a check, and two setups."""
    model = block_mlp(**SHAPE)
    named = list(model.named_parameters())
    two = [{"params": named[:3], "lr": 0.02}, {"params": named[3:], "weight_decay": 0.1}]
    opt = build(method, two if groups else model, directions=directions, perturb="in_place")
    for i in range(9):
        for bad in {3: [lambda: 1 / 0], 5: [lambda: float("nan")]}.get(i, []):
            with contextlib.suppress(ZeroDivisionError, ValueError):
                take_step(opt, bad)
        if i == 7:
            for group in opt.param_groups:
                group["eps"] *= 2
        if double:
            take_step(opt, lambda i=i: real_loss(model, i).double().item() * (1 + 1e-12))
        else:
            go(opt, model, 1)
    return opt.trajectory.to_bytes()


def records(data: bytes) -> list[bytes]:
    """Without the crc."""
    trajectory = zo.Trajectory.from_bytes(data)
    starts = sorted(trajectory._starts)
    found, at = [], len(MAGIC)
    while at < len(data):
        if at in starts:
            end = trajectory._ends[trajectory._starts.index(at)]
        elif data[at + 4] == 0:
            end = at + 12 + struct.unpack_from("<I", data, at + 8)[0]
        else:
            end = at + 16
        found.append(data[at + 4 : end])
        at = end
    return found


def sealed(parts: Sequence[bytes], magic: bytes = MAGIC) -> bytes:
    out, crc = magic, zlib.crc32(magic)
    for part in parts:
        crc = zlib.crc32(part, crc)
        out += struct.pack("<I", crc) + part
    return out


def ends(data: bytes) -> list[int]:
    """Where each record ends, and the first begins."""
    found = [len(MAGIC)]
    for part in records(data):
        found.append(found[-1] + 4 + len(part))
    return found


def setup_of(part: bytes) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(part[8:])
    return given


def setup_record(given: Any) -> bytes:
    text = given if isinstance(given, bytes) else json.dumps(given, separators=(",", ":")).encode()
    return struct.pack("<BBHI", 0, 0, 0, len(text)) + text
