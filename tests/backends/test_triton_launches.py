"""Compiled kernels are launched a second time as they were the first, without Triton's binder.

On a machine without a GPU a driver stands in that compiles for one and launches nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix import INTERPRETED_BLOCK, a_pass, check, interpreted_shards, table

from zo_kernels.backends.triton import launch
from zo_kernels.backends.tuning import Tuning, tuned
from zo_kernels.backends.types import MaskKind

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_matrix.py runs the launches")

PROGRAM = """
import torch
from benchmarks.host.stand_ins import standing_in
from zo_kernels import ops
from zo_kernels.backends.triton.kernels import axpy_kernel
from zo_kernels.backends.types import Entry, MaskKind, Pass

binder = type(axpy_kernel).run
bound = []
type(axpy_kernel).run = lambda self, *args, **kwargs: bound.append(self) or binder(self, *args, **kwargs)

def plain(launch):
    name, arguments = launch
    return name, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]

with standing_in("triton") as launched:
    entries = []
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        for n in (4096, 4099):
            w = torch.zeros(n, dtype=dtype)
            entries.append(Entry(w, w, 2 * i + n % 2, mask=MaskKind.THRESHOLD, threshold=0.5))
    table = ops.Table(entries, [str(i) for i in range(len(entries))], "triton")
    for do in (
        Pass([5], [[1e-3]], [1.0], True),
        Pass([6, 7], [[1.0, 2.0]], [0.5]),
        Pass([5], [[1e-3]], [1.0], True, distribution="rademacher"),  # as the first but for this
    ):
        launched.clear()
        bound.clear()
        table.apply(do)
        first = list(map(plain, launched))
        assert len(first) == len(bound) == 4, "a launch for each dtype and alignment"
        launched.clear()
        table.apply(do)
        assert list(map(plain, launched)) == first and len(bound) == 4
        launched.clear()
        # Other numbers are elsewhere in memory.
        other = Pass([9], [[1e-3]], do.decays, do.stochastic, distribution=do.distribution)
        table.apply(other)
        again = list(map(plain, launched))
        assert len(bound) == 4 and [name for name, _ in again] == [name for name, _ in first]
        for (_, a), (_, b) in zip(again, first, strict=True):
            differ = [at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
            # Of the grid's three, rows, ids, first_chunk, active, blocks_per_chunk, seeds, scales, decays, directions.
            assert {8, 9} <= set(differ) <= {8, 9, 10, 11}, differ
        launched.clear()
        table.apply(Pass([9], [[1e-3]], do.decays, do.stochastic, [3], do.distribution))
        ((_, only),) = map(plain, launched)
        assert len(bound) == 4 and only[3] in {a[3] for _, a in first}
        assert all(do.distribution in arguments for _, arguments in (*first, *again)), "another distribution's kernel"
print("equal")
"""


def test_later_launches_are_the_first_s():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("threads", [1, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [MaskKind.NONE, MaskKind.RECORD], ids=lambda kind: kind.name.lower())
def test_signs_do_not_depend_on_the_threads(monkeypatch, threads, dtype, kind):
    """With more threads each has fewer lines of a counter, or one: 8 warps, or those of 64 threads on AMD's GPUs."""
    monkeypatch.setattr(launch, "INTERPRETER_COUNTERS", INTERPRETED_BLOCK // 4)
    monkeypatch.setattr(launch, "_warp_size", lambda here: 1)
    entries = table(dtype, kind, in_place=True, shards=interpreted_shards(True, "rademacher"))
    with tuned(Tuning(warps=threads)):
        check("triton", torch.device("cpu"), entries, a_pass(2, "stochastic", 0.9, "rademacher"))


@pytest.mark.parametrize(("version", "reason"), [("3.2.0", "3.6 or later .*, got 3.2.0"), ("3.6.0", None)])
def test_an_old_triton_is_told(monkeypatch, version, reason):
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = launch.unavailable(torch.device("cuda", 0))
    assert told is None if reason is None else re.search(reason, told)
