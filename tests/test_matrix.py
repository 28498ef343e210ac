"""Every backend does to every kind of tensor what the reference does, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import (
    BACKENDS,
    DTYPES,
    ROUNDINGS,
    SHARDS,
    a_pass,
    assert_same_bits,
    bits,
    check,
    shards_for,
    table,
    to,
    weights,
)

from zo_kernels import backends
from zo_kernels.backends import gpu_table, reference
from zo_kernels.backends.types import Entry, MaskKind, Pass

NATIVE = [name for name, _ in BACKENDS if name.startswith("native:")]
each_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=lambda x: str(x))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", list(MaskKind), ids=lambda k: k.name.lower())
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_matrix(backend, device, dtype, kind, rounding):
    in_place = rounding == "nearest"
    shards = shards_for(backend, device)
    if shards is SHARDS or not in_place:
        entries = table(dtype, kind, in_place=not in_place, shards=shards)
        check(backend, device, entries, a_pass(3, rounding, decay=0.9))
    if shards is SHARDS or in_place:
        check(backend, device, table(dtype, kind, in_place=in_place, shards=shards), a_pass(1, rounding))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_only_active_entries_change(backend, device, dtype):
    entries = table(dtype, MaskKind.NONE, in_place=True, shards=shards_for(backend, device))
    active = [3, 4, 1]
    do = replace(a_pass(1, "nearest"), active=active)
    check(backend, device, entries, do)
    got = to(entries, device)
    backends.resolve(backend, device).prepare(got)(do)
    untouched = [i for i in range(len(entries)) if i not in active]
    assert_same_bits([got[i] for i in untouched], [entries[i] for i in untouched])


@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b[0] != "triton"], ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_directions_of_one_seed_in_a_row(backend, device, dtype):
    """Their noise may be made once; the sum is rounded after each of them all the same."""
    seeds, scales = [5, 5, 7, 5, 7, 7, 7], [1e-3, -2e-3, 0.25, 3e-6, -1.0, 1e-7, 0.7]
    for n in (1, 2, 7):
        do = Pass(seeds[:n], [scales[:n], scales[::-1][:n]], [0.9, 1.0], True)
        check(backend, device, table(dtype, MaskKind.NONE, in_place=True), do)


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


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", [MaskKind.NONE, MaskKind.RECORD], ids=lambda k: k.name.lower())
def test_bits_do_not_depend_on_threads_or_shards(backend, kind):
    n = 2 * 2**15 + 77  # several chunks of work and a ragged one
    want = weights(n, torch.bfloat16, 0)
    want_bits = torch.zeros((n + 7) // 8, dtype=torch.uint8)
    do = a_pass(2, "stochastic")
    reference.prepare([Entry(want, want, 9, 0, 0, kind, 0.01, want_bits)])(do)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        w, recorded = weights(n, torch.bfloat16, 0), torch.zeros_like(want_bits)
        backends.resolve(backend, w.device).prepare([Entry(w, w, 9, 0, 0, kind, 0.01, recorded)])(do)
        assert torch.equal(bits(w), bits(want))
        assert kind is MaskKind.NONE or torch.equal(recorded, want_bits)
    w = weights(n, torch.bfloat16, 0)
    cuts = [0, 1, 4098, 50001, n]
    shards = [Entry(w[a:b], w[a:b], 9, a) for a, b in pairwise(cuts)]
    whole = weights(n, torch.bfloat16, 0)
    reference.prepare([Entry(whole, whole, 9)])(do)
    backends.resolve(backend, w.device).prepare(shards)(do)
    assert torch.equal(bits(w), bits(whole))


@pytest.mark.parametrize("backend", NATIVE)
def test_flushing_subnormals_changes_nothing(backend):
    # A caller's floating-point mode must not reach the kernels: weights and scales this small give subnormal sums.
    entries = [Entry(w, w, 3) for w in [torch.full((64,), 1e-39)]]
    want = to(entries, torch.device("cpu"))
    do = Pass([5], [[1e-39]], [1.0])
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
    offset = data.draw(st.one_of(st.integers(0, 9), st.integers(0, 2**62), st.integers(2**34 - 300, 2**34)), "offset")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    kind = data.draw(st.sampled_from(list(MaskKind)), "kind")
    k = data.draw(st.integers(1, 4), "directions")
    scale = st.floats(-1e3, 1e3, width=32)
    do = Pass(
        data.draw(st.lists(st.sampled_from([1, 2]) | st.integers(0, 2**64 - 1), min_size=k, max_size=k), "seeds"),
        [data.draw(st.lists(scale, min_size=k, max_size=k), "scales")],
        [data.draw(st.sampled_from([1.0, 0.0, 0.999, -1.5]), "decay")],
        data.draw(st.booleans(), "stochastic"),
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
def test_chunks_of_several_blocks(monkeypatch, kind):
    """A GPU's program takes several blocks of a large table; a chunk need not begin or end with the tensor."""
    triton = [(name, device) for name, device in BACKENDS if name == "triton"]
    if not triton:
        pytest.skip("Triton runs neither a GPU nor its interpreter here")
    monkeypatch.setattr(gpu_table, "_ENOUGH_PROGRAMS", 4)
    block = gpu_table.BLOCK
    if triton[0][1].type == "cpu":
        monkeypatch.setattr("zo_kernels.backends.triton.launch.INTERPRETER_COUNTERS", 64)
        block = 256
    entries = []
    for i, (n, offset) in enumerate([(5 * block + 8, block - 16), (3 * block + 1, 2**34 - block - 3)]):
        w, recorded = weights(n, torch.bfloat16, i), torch.zeros((n + 7) // 8, dtype=torch.uint8)
        entries.append(Entry(w, w, 9 + i, offset, i, kind, 0.01, recorded))
    assert gpu_table.GpuTable(entries, block).groups[0].blocks_per_chunk == 2
    check(*triton[0], entries, a_pass(1, "stochastic"))
