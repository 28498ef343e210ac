"""Every backend does to every kind of tensor what the reference does, to the last bit."""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import (
    BACKENDS,
    DISTRIBUTIONS,
    DTYPES,
    HIGH,
    INTERPRETED_BLOCK,
    ROUNDINGS,
    SHARDS,
    SMALL,
    a_pass,
    assert_same_bits,
    bits,
    check,
    check_case,
    check_far_chunk,
    interpreted,
    interpreted_shards,
    table,
    to,
    weights,
)

from zo_kernels import backends
from zo_kernels.backends import gpu_table, reference
from zo_kernels.backends.tuning import DEFAULT, Tuning, tuned
from zo_kernels.backends.types import Entry, MaskKind, Pass

NATIVE = [name for name, _ in BACKENDS if name.startswith("native:")]
each_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=str)
# Each once: "native" is the first of the instruction sets.
KERNELS = [b for b in BACKENDS if b[0] != "native"]
each_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_kind = pytest.mark.parametrize("kind", list(MaskKind), ids=lambda k: k.name.lower())
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)
in_place_or_not = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Where they are interpreted, so that tensors have whole ones."""
    monkeypatch.setattr("zo_kernels.backends.triton.launch.INTERPRETER_COUNTERS", INTERPRETED_BLOCK // 4)


@each_kernel
@each_dtype
@each_kind
@each_rounding
@in_place_or_not
@each_distribution
def test_matrix(backend, device, dtype, kind, rounding, in_place, distribution):
    check_case(backend, device, dtype, kind, rounding, in_place, distribution)


@pytest.mark.parametrize("few", [False, True], ids=["all", "interpreted"])
@each_dtype
@each_kind
@in_place_or_not
@each_distribution
def test_every_kind_of_block_is_in_the_matrix(few, dtype, kind, in_place, distribution):
    """Kernels of GPUs differ by alignment, and what they do of a block by its being whole or where it is ragged."""
    block, tables = gpu_table.BLOCK, [(SHARDS, HIGH[distribution])]
    if few:
        tables = [(interpreted_shards(plain, distribution), HIGH[distribution][-plain:][:1]) for plain in (False, True)]
        block = INTERPRETED_BLOCK
    for aligned in (True, False):
        ragged_at_start = ragged_at_end = False
        for shards, high in tables:
            entries = [e for e in table(dtype, kind, in_place=in_place, shards=shards) if e.dst.numel()]
            assert aligned in {group.aligned for group in gpu_table.GpuTable(entries, block).groups}
            ends = [(e.offset, e.offset + e.dst.numel()) for e in entries if gpu_table.is_aligned(e) == aligned]
            assert any(stop // block > -(-start // block) for start, stop in ends), "no block is whole"
            for limit in high:
                assert any(start < limit < stop for start, stop in ends), "none has two high halves of its counters"
            ragged_at_start |= any(start % block and start // block < stop // block for start, stop in ends)
            ragged_at_end |= any(stop % block and start // block < stop // block for start, stop in ends)
        assert ragged_at_start and ragged_at_end


@pytest.mark.parametrize(("backend", "device"), [b for b in KERNELS if b[0] in ("triton", "cuda")], ids=str)
def test_gpus_have_the_blocks_of_the_matrix(monkeypatch, backend, device):
    blocks = []

    class Spy(gpu_table.GpuTable):
        def __init__(self, entries, block=gpu_table.BLOCK):
            blocks.append(block)
            super().__init__(entries, block)

    for module in ("triton.launch", "cuda"):
        monkeypatch.setattr(f"zo_kernels.backends.{module}.GpuTable", Spy)
    check_case(backend, device, torch.bfloat16, MaskKind.NONE, "nearest", True)
    assert set(blocks) == {INTERPRETED_BLOCK if interpreted(backend, device) else gpu_table.BLOCK}


@each_dtype
@in_place_or_not
def test_memory_of_every_alignment_is_in_the_matrix(dtype, in_place):
    """Of tensors with whole blocks, which their length and index would let be accessed widely."""
    unaligned = set()
    for e in table(dtype, MaskKind.BOOL, in_place=in_place):
        if e.dst.numel() % 8 == 0 and e.offset % 8 == 0 and e.dst.numel() >= gpu_table.BLOCK:
            rests = {"dst": e.dst.data_ptr() % 16, "src": e.src.data_ptr() % 16, "mask": e.mask_tensor.data_ptr() % 8}
            unaligned.add(frozenset(name for name, rest in rests.items() if rest))
            assert gpu_table.is_aligned(e) == (not any(rests.values()))
    both = frozenset({"dst", "src"})
    assert unaligned == {frozenset(), both, frozenset({"mask"})} | (
        set() if in_place else {frozenset({"dst"}), frozenset({"src"})}
    )


@each_dtype
@pytest.mark.parametrize(
    ("shard", "aligned"), [((16, 8), True), ((12, 8), False), ((16, 4), False), ((16, 8, 8, 8), True)], ids=str
)
def test_whole_rows_and_bytes_of_mask_bits_are_aligned(dtype, shard, aligned):
    """Eights of elements, also of float32, whose rows have four."""
    [entry] = table(dtype, MaskKind.BITS, in_place=False, shards=[shard])
    assert gpu_table.is_aligned(entry) == aligned


@each_kernel
def test_alignment_survives_the_way_to_a_device(backend, device):
    entries = table(torch.bfloat16, MaskKind.BOOL, in_place=False)
    assert [gpu_table.is_aligned(e) for e in to(entries, device)] == [gpu_table.is_aligned(e) for e in entries]


@each_backend
@each_dtype
def test_only_active_entries_change(backend, device, dtype):
    entries = table(dtype, MaskKind.NONE, in_place=True, shards=SMALL[:8])
    active = [3, 4, 1]
    got = check(backend, device, entries, replace(a_pass(1, "nearest"), active=active))
    untouched = [i for i in range(len(entries)) if i not in active]
    assert_same_bits([got[i] for i in untouched], [entries[i] for i in untouched])


@pytest.mark.parametrize(("backend", "device"), [b for b in KERNELS if b[0] != "triton"], ids=str)
@each_dtype
@each_distribution
def test_directions_of_one_seed_in_a_row(backend, device, dtype, distribution):
    """Their noise may be made once; the sum is rounded after each of them all the same."""
    seeds, scales = [5, 5, 7, 5, 7, 7, 7], [1e-3, -2e-3, 0.25, 3e-6, -1.0, 1e-7, 0.7]
    for n in (1, 2, 7):
        do = Pass(seeds[:n], [scales[:n], scales[::-1][:n]], [0.9, 1.0], True, distribution=distribution)
        check(backend, device, table(dtype, MaskKind.NONE, in_place=True, shards=SMALL), do)


@pytest.mark.parametrize("backend", NATIVE)
@each_dtype
@pytest.mark.parametrize("directions", [31, 33, 96])
def test_more_signs_than_are_added_at_once(backend, dtype, directions):
    """Sums wait for further directions, some of which repeat a seed."""
    seeds = [k - k % 5 % 2 for k in range(directions)]
    scales = [(-1) ** k * 10.0 ** (k % 7 - 5) for k in range(directions)]
    do = Pass(seeds, [scales, scales[::-1]], [1.0, 0.9], True, distribution="rademacher")
    shards = [(5, 30), (1025, 2), (2500, 2**39 - 130)]
    check(backend, torch.device("cpu"), table(dtype, MaskKind.RECORD, in_place=False, shards=shards), do)


@pytest.mark.parametrize("backend", NATIVE)
@each_dtype
@each_distribution
@each_rounding
@pytest.mark.parametrize("payload", [1, 2**51, 2**52 - 1], ids=hex)
def test_every_nan_stays_one(backend, dtype, distribution, rounding, payload):
    """Also one whose bits, all set, would carry into the sign when it is rounded: of weights, a scale or a decay."""
    [nan] = struct.unpack("<d", struct.pack("<Q", 0x7FF << 52 | payload))
    w = torch.tensor([*range(1, 2**10), *range(2**15 - 2**10, 2**15)] * 2, dtype=torch.int16)
    w[w.numel() // 2 :] |= -(2**15)
    weights = w.view(dtype) if dtype != torch.float32 else (w.int() << 16).view(dtype)
    for scale, decay in ((1e-3, 1.0), (nan, 1.0), (1e-3, nan), (torch.inf, 1.0), (1e-3, torch.inf)):
        entry = Entry(torch.empty_like(weights), weights, 3)
        check(
            backend,
            weights.device,
            [entry],
            Pass([1], [[scale]], [decay], rounding == "stochastic", None, distribution),
        )


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("scales", [[0.5, -1.0, 0.5], [0.5, -0.5], [0.5, -1.0, 0.5] * 13, [0.0] * 4], ids=len)
@pytest.mark.parametrize("decay", [1.0, -1.0, 0.0])
def test_sums_of_zero_have_the_sign_of_the_reference(backend, scales, decay):
    """A kernel may negate elements while it adds several scales of one seed of signs to them."""
    halves = torch.randint(-4, 5, (3000,), generator=torch.Generator().manual_seed(0)) * 0.5
    halves[::17] = -0.0
    do = Pass([k // 3 for k in range(len(scales))], [scales], [decay], distribution="rademacher")
    check(backend, torch.device("cpu"), [Entry(halves, halves, 5, 37)], do)


@each_backend
def test_memory_that_is_not_aligned(backend, device):
    storage = weights(1001, torch.bfloat16, 0).to(device)
    whole = storage.clone()
    do = a_pass(1, "stochastic")
    part = storage[1:998]
    backends.resolve(backend, device).prepare([Entry(part, part, 5)])(do)
    want = whole[1:998].cpu().clone()
    reference.prepare([Entry(want, want, 5)])(do)
    assert torch.equal(bits(part), bits(want))
    assert torch.equal(bits(storage[:1]), bits(whole[:1])) and torch.equal(bits(storage[998:]), bits(whole[998:]))


SEVERAL_CHUNKS = 2 * 2**15 + 77  # of work for a thread, and a ragged one


@lru_cache
def several_chunks(kind, distribution):
    """The bits of a tensor after a pass, and the mask bits that it recorded."""
    w, recorded = weights(SEVERAL_CHUNKS, torch.bfloat16, 0), torch.zeros((SEVERAL_CHUNKS + 7) // 8, dtype=torch.uint8)
    reference.prepare([Entry(w, w, 9, 0, 0, kind, 0.01, recorded)])(two_directions(distribution))
    return bits(w), recorded


def two_directions(distribution):
    return a_pass(2, "stochastic", distribution=distribution)


@pytest.mark.parametrize(("backend", "device"), [b for b in KERNELS if b[0] in ("triton", "cuda")], ids=str)
@each_dtype
@pytest.mark.parametrize("directions", [9, 12])
def test_signs_of_many_directions(backend, device, dtype, directions):
    """On a GPU the words of eight further directions are made together, the last time maybe of fewer."""
    shards = interpreted_shards(True, "rademacher") if interpreted(backend, device) else SHARDS
    scales = [1e-3 * (-1.5) ** k for k in range(directions)]
    do = Pass(list(range(directions)), [scales, scales[::-1]], [0.9, 1.0], True, distribution="rademacher")
    check(backend, device, table(dtype, MaskKind.NONE, in_place=True, shards=shards), do)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", [MaskKind.NONE, MaskKind.RECORD], ids=lambda k: k.name.lower())
@each_distribution
def test_bits_do_not_depend_on_threads(backend, kind, distribution):
    want, want_recorded = several_chunks(kind, distribution)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        w, recorded = weights(SEVERAL_CHUNKS, torch.bfloat16, 0), torch.zeros_like(want_recorded)
        entry = Entry(w, w, 9, 0, 0, kind, 0.01, recorded)
        backends.resolve(backend, w.device).prepare([entry])(two_directions(distribution))
        assert torch.equal(bits(w), want)
        assert torch.equal(recorded, want_recorded)


@pytest.mark.parametrize("backend", NATIVE)
@each_distribution
def test_bits_do_not_depend_on_shards(backend, distribution):
    w = weights(SEVERAL_CHUNKS, torch.bfloat16, 0)
    shards = [Entry(w[a:b], w[a:b], 9, a) for a, b in pairwise([0, 1, 4098, 50001, SEVERAL_CHUNKS])]
    backends.resolve(backend, w.device).prepare(shards)(two_directions(distribution))
    assert torch.equal(bits(w), several_chunks(MaskKind.NONE, distribution)[0])


@pytest.mark.parametrize("backend", NATIVE)
@each_distribution
def test_flushing_subnormals_changes_nothing(backend, distribution):
    # A caller's floating-point mode must not reach the kernels: weights and scales this small give subnormal sums.
    entries = [Entry(w, w, 3) for w in [torch.full((64,), 1e-39)]]
    want = to(entries, torch.device("cpu"))
    do = Pass([5], [[1e-39]], [1.0], distribution=distribution)
    reference.prepare(want)(do)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        backends.resolve(backend, torch.device("cpu")).prepare(entries)(do)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(entries, want)


@pytest.mark.parametrize("backend", NATIVE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pass(backend, data):
    n = data.draw(st.integers(0, 300), "n")
    near = [st.integers(high - 300, high) for limits in HIGH.values() for high in limits]
    offset = data.draw(st.one_of(st.integers(0, 200), st.integers(0, 2**62), *near), "offset")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    kind = data.draw(st.sampled_from(list(MaskKind)), "kind")
    k = data.draw(st.integers(1, 4), "directions")
    scale = st.floats(-1e3, 1e3, width=32)
    do = Pass(
        data.draw(st.lists(st.sampled_from([1, 2]) | st.integers(0, 2**64 - 1), min_size=k, max_size=k), "seeds"),
        [data.draw(st.lists(scale, min_size=k, max_size=k), "scales")],
        [data.draw(st.sampled_from([1.0, 0.0, 0.999, -1.5]), "decay")],
        data.draw(st.booleans(), "stochastic"),
        distribution=data.draw(st.sampled_from(DISTRIBUTIONS), "distribution"),
    )
    src = weights(n, dtype, data.draw(st.integers(0, 99), "weights"))
    dst = src if data.draw(st.booleans(), "in place") else torch.full_like(src, torch.nan)
    mask = None
    if kind is MaskKind.BOOL:
        mask = torch.rand(n) < 0.5
    elif kind is not MaskKind.NONE:
        mask = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8)
    param_id = data.draw(st.integers(0, 2**32 - 1), "param_id")
    check(backend, torch.device("cpu"), [Entry(dst, src, param_id, offset, 0, kind, 1e-4, mask)], do)


@pytest.mark.parametrize("kind", [MaskKind.NONE, MaskKind.RECORD], ids=lambda k: k.name.lower())
@pytest.mark.parametrize("tuning", [DEFAULT, Tuning(prefetch=True, most_blocks=2, warps=8)], ids=["", "tuned"])
@in_place_or_not
@each_distribution
def test_chunks_of_several_blocks(monkeypatch, kind, tuning, in_place, distribution):
    """A GPU's program takes several blocks of a large table; a chunk need not begin or end with the tensor. Tuning
    changes no bit.
    """
    triton = [(name, device) for name, device in BACKENDS if name == "triton"]
    if not triton:
        pytest.skip("Triton runs neither a GPU nor its interpreter here")
    monkeypatch.setattr(gpu_table, "_ENOUGH_PROGRAMS", 4)
    block = INTERPRETED_BLOCK if interpreted(*triton[0]) else gpu_table.BLOCK
    shards = [(3 * block + 24, block - 16), (2 * block + 6, 2**34 - block - 3)]
    entries = table(torch.bfloat16, kind, in_place=in_place, shards=shards)
    with tuned(tuning):
        assert gpu_table.GpuTable(entries, block).groups[0].blocks_per_chunk == 2
        check(*triton[0], entries, a_pass(1, "stochastic", distribution=distribution))


@pytest.fixture
def overflows_are_seen():
    """As they are outside of tests."""
    if not any(interpreted(*kernel) for kernel in KERNELS):
        yield
        return
    from quick_interpreter import look_for_overflows

    look_for_overflows(True)
    yield
    look_for_overflows(False)


@pytest.mark.usefixtures("overflows_are_seen")
@pytest.mark.parametrize(("backend", "device"), [b for b in KERNELS if b[0] in ("triton", "cuda")], ids=str)
@each_kind
@pytest.mark.parametrize("ragged", [0, 3], ids=["aligned", "not aligned"])
@each_distribution
def test_a_chunk_beyond_2_32_elements(backend, device, kind, ragged, distribution):
    """In 32 bits its index would be another one's."""
    block = INTERPRETED_BLOCK if interpreted(backend, device) else gpu_table.BLOCK
    check_far_chunk(backend, device, kind, 2**32, block - ragged, block, distribution)


def meta_entry(n, kind=MaskKind.NONE):
    w = torch.empty(n, dtype=torch.bfloat16, device="meta")
    return Entry(w, w, 0, 0, 0, kind, 1.0, torch.empty((n + 7) // 8, dtype=torch.uint8, device="meta"))


def test_programs_that_no_launch_has():
    """A launch's programs are counted in 32 bits: more are refused before anything is launched."""
    chunk = DEFAULT.most_blocks * gpu_table.BLOCK
    most = meta_entry(gpu_table.MOST_PROGRAMS * chunk)
    assert gpu_table.GpuTable([most]).groups[0].work(None).programs == 2**31 - 1
    with pytest.raises(ValueError, match=r"expected work for at most 2147483647 programs of a GPU, got 2147483648"):
        gpu_table.GpuTable([most, meta_entry(8)])
    with pytest.raises(ValueError, match=r"at most 2147483647 programs of a GPU, got 4294967296"):
        gpu_table.GpuTable([meta_entry(2**32 * chunk)])
    gpu_table.GpuTable([meta_entry(2**41 + 8, MaskKind.RECORD)])
    with pytest.raises(ValueError, match=r"at most 2147483647 programs of a GPU, got 2147483649"):
        gpu_table.GpuTable([meta_entry(2**41 + 1, MaskKind.RECORD)])
