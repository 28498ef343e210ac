"""The CUDA kernels, emulated on the host, do what the reference does, to the last bit."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from default_device import with_and_without
from matrix import (
    DISTRIBUTIONS,
    DTYPES,
    LARGE,
    ROUNDINGS,
    SMALL,
    a_pass,
    assert_same_bits,
    bits,
    check_case,
    check_far_chunk,
    table,
    to,
    weights,
)
from matrix import check as check_backend

from zo_kernels.backends import cuda, gpu_table, reference
from zo_kernels.backends.types import Entry, MaskKind, Pass

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import cuda as emulation

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler (g++, or $CXX)")

CPU = torch.device("cpu")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_kind = pytest.mark.parametrize("kind", list(MaskKind), ids=lambda k: k.name.lower())
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@pytest.fixture(scope="module")
def library():
    return emulation.build()


@pytest.fixture(autouse=True)
def emulated(library, monkeypatch):
    """The backend runs on the host."""
    monkeypatch.setattr(cuda, "_cuda", library)


def check(entries: list[Entry], do: Pass) -> list[Entry]:
    return check_backend(cuda, CPU, entries, do)


@each_dtype
@each_kind
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
@each_distribution
def test_matrix(dtype, kind, rounding, in_place, distribution):
    check_case(cuda, CPU, dtype, kind, rounding, in_place, distribution)


@each_kind
@pytest.mark.parametrize("ragged", [0, 3], ids=["aligned", "not aligned"])
@each_distribution
def test_a_chunk_beyond_2_32_elements(kind, ragged, distribution):
    check_far_chunk(cuda, CPU, kind, 2**32, gpu_table.BLOCK - ragged, gpu_table.BLOCK, distribution)


@each_dtype
@pytest.mark.parametrize("decay", [1.0, 0.9])
@each_distribution
def test_programs_of_several_blocks(dtype, decay, distribution, monkeypatch):
    monkeypatch.setattr(gpu_table, "_ENOUGH_PROGRAMS", 16)
    entries = table(dtype, MaskKind.RECORD, in_place=True, shards=[*LARGE, (3 * 8192, 2**20 + 2048), (20000, 16)])
    assert gpu_table.GpuTable(entries).groups[0].blocks_per_chunk == 4
    check(entries, a_pass(2, "stochastic", decay, distribution))


@each_dtype
@pytest.mark.parametrize("kind", [MaskKind.NONE, MaskKind.RECORD], ids=lambda k: k.name.lower())
@pytest.mark.parametrize("directions", [7, 8, 9, 19])
def test_groups_of_directions(dtype, kind, directions):
    """A warp makes the words of eight directions of signs at a time: groups that are full, and that are not."""
    entries = table(dtype, kind, in_place=True, shards=[(2 * gpu_table.BLOCK, 2**39 - gpu_table.BLOCK), (17, 0)])
    scales = [[0.7**k for k in range(directions)], [-(0.6**k) for k in range(directions)]]
    check(entries, Pass(range(directions), scales, [1.0, 1.0], True, distribution="rademacher"))


@each_dtype
@each_kind
def test_only_active_entries_change(dtype, kind):
    entries = table(dtype, kind, in_place=True, shards=SMALL[:8] + LARGE)
    active = [12, 3, 0, 5, 8, 16]
    got = check(entries, replace(a_pass(1, "nearest"), active=active))
    untouched = [i for i in range(len(entries)) if i not in active]
    assert_same_bits([got[i] for i in untouched], [entries[i] for i in untouched])


def test_kinds_and_dtypes_share_a_table():
    entries = [e for dtype in DTYPES for kind in MaskKind for e in table(dtype, kind, in_place=True, shards=LARGE[:2])]
    check(entries, a_pass(1, "stochastic"))


@each_dtype
@each_kind
@pytest.mark.parametrize("start", [1, 8])
def test_memory_that_is_not_aligned(dtype, kind, start):
    n = 4096
    storage = weights(n + start + 4, dtype, 0)
    mask_storage = torch.randint(0, 256, (n + start,), dtype=torch.uint8)
    mask = mask_storage[start : start + (n + 7) // 8].clone()
    if kind is MaskKind.BOOL:
        mask = (mask_storage[start:] & 1).bool()
    want, got = storage.clone(), storage.clone()
    make = lambda w, m: [Entry(w[start : start + n], w[start : start + n], 5, 16, 0, kind, 1e-3, m)]  # noqa: E731
    do, recorded, expected = a_pass(1, "stochastic"), mask.clone(), mask.clone()
    cuda.prepare(make(got, recorded))(do)
    reference.prepare(make(want, expected))(do)
    assert torch.equal(bits(got), bits(want))
    assert torch.equal(recorded, expected)


@each_dtype
@each_kind
def test_masked_weights_keep_their_bits(dtype, kind):
    """NaNs too, with their payloads."""
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    w = torch.randint(torch.iinfo(as_int).min, torch.iinfo(as_int).max, (8192,)).to(as_int).view(dtype)
    no = torch.zeros(8192, dtype=torch.bool) if kind is MaskKind.BOOL else torch.zeros(1024, dtype=torch.uint8)
    before, changing = w.clone(), w.abs() <= 0.25
    cuda.prepare([Entry(w, w, 7, 0, 0, kind, 0.25, no)])(a_pass(1, "stochastic"))
    if kind in (MaskKind.BOOL, MaskKind.BITS):
        changing[:] = False
    if kind is not MaskKind.NONE:
        assert torch.equal(w.view(as_int)[~changing], before.view(as_int)[~changing])


THRESHOLDS = [
    -1.0,
    -0.0,
    0.0,
    1e-45,
    5e-8,
    6e-8,
    6e-5,
    1.0,
    1.003,
    65503.0,
    65504.0,
    65536.0,
    1e36,
    3e36,
    3e38,
    math.inf,
]


@each_dtype
@pytest.mark.parametrize("kind", [MaskKind.THRESHOLD, MaskKind.RECORD], ids=lambda k: k.name.lower())
def test_thresholds(dtype, kind):
    """Of all magnitudes, on the weights next to them; bfloat16 and float16 are compared in 16 bits."""
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    entries = []
    for i, h in enumerate(THRESHOLDS):
        middle = int(torch.tensor(abs(h)).to(dtype).view(as_int))
        positive = (torch.arange(2048) + middle - 1024).clamp(0, torch.iinfo(as_int).max).to(as_int)
        w = torch.cat([positive, positive | torch.iinfo(as_int).min]).view(dtype)
        entries.append(Entry(w, w, i, 0, 0, kind, h, torch.zeros(512, dtype=torch.uint8)))
    check(entries, a_pass(1, "nearest"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("rounding", ROUNDINGS)
@each_distribution
def test_every_weight_is_rounded(dtype, rounding, distribution):
    """All 2**16, with noise from less than half of most last places to overflow."""
    for scale in (1e-3, 3e4, 1e37):
        w = torch.arange(2**16).to(torch.int16).view(dtype)
        check([Entry(w, w, 3)], Pass([11], [[scale]], [1.0], rounding == "stochastic", distribution=distribution))


@pytest.mark.parametrize(("dtype", "infinity"), [(1, 0x7F80), (2, 0x7C00)], ids=["bfloat16", "float16"])
def test_a_gpus_nan_stays_one(library, dtype, infinity):
    """It is 0x7fffffff, which no host makes, and a carry from it would be a zero."""
    for rho in (0, 1, 0xFFFF):
        pair = library.round_pair(dtype, 0x7FFFFFFF, 0x7F800000, rho, rho)
        assert infinity < pair & 0x7FFF <= 0x7FFF
        assert pair >> 16 == infinity


@each_distribution
def test_bits_do_not_depend_on_shards(distribution):
    n = 2 * 8192 + 72
    cuts = [0, 1, 4098, 8192, 12000, n]
    w, whole = weights(n, torch.bfloat16, 0), weights(n, torch.bfloat16, 0)
    do = a_pass(2, "stochastic", distribution=distribution)
    cuda.prepare([Entry(w[a:b], w[a:b], 9, a) for a, b in pairwise(cuts)])(do)
    cuda.prepare([Entry(whole, whole, 9)])(do)
    assert torch.equal(bits(w), bits(whole))


def test_numbers_may_be_tensors():
    entries, do = table(torch.float32, MaskKind.NONE, in_place=True, shards=LARGE), a_pass(2, "nearest", 0.9)
    want, got = to(entries, CPU), to(entries, CPU)
    cuda.prepare(want)(do)
    seeds = [torch.tensor(s - 2**64 if s >= 2**63 else s) for s in do.seeds]
    cuda.prepare(got)(Pass(seeds, torch.tensor(do.scales), torch.tensor(do.decays, dtype=torch.float64)))
    assert_same_bits(got, want)


def test_nothing_to_do():
    cuda.prepare([])(a_pass(1, "nearest"))
    empty = torch.empty(0)
    cuda.prepare([Entry(empty, empty, 1)])(a_pass(1, "nearest"))


@pytest.mark.parametrize("kind", [MaskKind.NONE, MaskKind.RECORD], ids=lambda k: k.name.lower())
def test_a_default_device_changes_nothing(kind):
    entries = table(torch.bfloat16, kind, in_place=True, shards=[(64, 0), (5, 2), (64, 8)])

    def make():
        got = to(entries, CPU)
        cuda.prepare(got)(replace(a_pass(2, "stochastic", 0.9), active=[1, 2]))
        return got

    assert_same_bits(*with_and_without(make))
