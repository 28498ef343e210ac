"""Tensors that are dense but not contiguous: every backend does to them what it does to a contiguous one, element by
element of the same logical index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from matrix import BACKENDS, DTYPES, INTERPRETED_BLOCK, a_pass, assert_same_bits, bits, interpreted, placed, weights

import zo_kernels as zo
from zo_kernels import backends
from zo_kernels.backends import native, reference, staged
from zo_kernels.backends.types import Entry, MaskKind
from zo_kernels.layouts import in_memory_order, is_dense, stretches
from zo_kernels.ops import Table
from zo_kernels.trajectory.fingerprint import summed

KERNELS = [*(b for b in BACKENDS if b[0] != "native"), ("reference", torch.device("cpu"))]
NATIVE = [name for name, _ in BACKENDS if name.startswith("native:")]
# In memory, the dimensions from the outermost to the innermost.
ORDERS = {"channels_last": (0, 2, 3, 1), "transposed": (1, 0), "channels_last_3d": (0, 2, 3, 4, 1), "any": (2, 0, 3, 1)}


def laid_out(t: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """A copy whose dimensions lie in memory in this order."""
    return t.permute(*order).contiguous().clone().permute([order.index(d) for d in range(t.dim())])


def entries_of(dtype: torch.dtype, kind: MaskKind, in_place: bool, device: torch.device) -> list[list[Entry]]:
    """A table of tensors of all layouts, dst and src of the same and of different ones; and one of contiguous ones."""
    shapes = [(7, 5, 3, 3), (19, 24), (9, 3), (1, 6, 1, 2)]
    orders = [(ORDERS["channels_last"], ORDERS["channels_last"]), (ORDERS["transposed"], (0, 1)), ((0, 1), (0, 1))]
    orders += [(ORDERS["any"], ORDERS["channels_last"])]
    made: list[list[Entry]] = [[], []]
    for i, (shape, (order, other)) in enumerate(zip(shapes, orders, strict=True)):
        n, g = math.prod(shape), torch.Generator().manual_seed(i)
        w = weights(n, dtype, i).view(shape)
        mask = torch.rand(n, generator=g) < 0.5
        if kind is not MaskKind.BOOL:
            mask = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=g)
        for entries, as_is in zip(made, (False, True), strict=True):
            src = (w.clone() if as_is else laid_out(w, order if in_place else other)).to(device)
            empty = torch.full_like(w, torch.nan)
            dst = src if in_place else (empty if as_is else laid_out(empty, order)).to(device)
            one = None if kind in (MaskKind.NONE, MaskKind.THRESHOLD) else placed(mask, 0, device)
            offset = (0, 2**34 - 100, 3, 2**34 - 5)[i]
            entries.append(Entry(dst, src, 7 * i, offset, i % 2, kind, 0.01, one))
    return made


def check(backend: str, device: torch.device, dtype: torch.dtype, kind: MaskKind, in_place: bool, active=None) -> None:
    got, want = entries_of(dtype, kind, in_place, device)
    strides = [e.dst.stride() for e in got]
    do = replace(a_pass(1 if kind is MaskKind.NONE else 2, "stochastic", decay=0.9), active=active)
    want = [replace(e, dst=e.dst.cpu(), src=e.src.cpu()) for e in want] if device.type == "cuda" else want
    reference.prepare(want)(do)
    Table(got, [str(i) for i in range(len(got))], backend).apply(do)
    assert_same_bits(got, want)
    assert [e.dst.stride() for e in got] == strides


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is staged is cut, and falls into several batches, and a block is no larger than it must be."""
    monkeypatch.setattr(staged, "MOST_BYTES", 700)
    monkeypatch.setattr("zo_kernels.backends.triton.launch.INTERPRETER_COUNTERS", INTERPRETED_BLOCK // 4)


@pytest.mark.parametrize(
    ("backend", "device", "kind"),
    [
        pytest.param(*kernel, kind, id=f"{kernel[0]}-{kernel[1]}-{kind.name.lower()}")
        for kernel in KERNELS
        for kind in MaskKind
        if not interpreted(*kernel) or kind in (MaskKind.BOOL, MaskKind.RECORD)  # whose time is dear
    ],
)
def test_every_layout(backend: str, device: torch.device, kind: MaskKind) -> None:
    # Other backends than the native ones are given contiguous memory, whatever the dtype.
    for dtype in DTYPES if backend in NATIVE else [torch.bfloat16]:
        for in_place in [kind is MaskKind.BOOL] if interpreted(backend, device) else [True, False]:
            check(backend, device, dtype, kind, in_place)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("active", [[1], [2], [3, 0], []], ids=str)
def test_only_active_entries_change(backend: str, active: list[int]) -> None:
    check(backend, torch.device("cpu"), torch.float32, MaskKind.RECORD, False, active)


@pytest.mark.parametrize("backend", NATIVE[:1])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((30, 130, 3, 3), ORDERS["channels_last"]),  # two chunks
        ((6, 5, 2, 3, 4), ORDERS["channels_last_3d"]),
        ((4, 3, 5, 2, 6), (2, 0, 4, 1, 3)),
        ((70, 1030), ORDERS["transposed"]),  # a chunk of 64 rows and a ragged one
        ((2, 2**19 + 5), ORDERS["transposed"]),  # two of less than their rows
    ],
    ids=str,
)
def test_chunks_of_the_native_backend(backend: str, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    """By threads, with a mask that is recorded: as of the contiguous tensor."""
    want = weights(math.prod(shape), torch.bfloat16, 3).view(shape)
    recorded = [torch.zeros((want.numel() + 7) // 8, dtype=torch.uint8) for _ in range(3)]
    got = [laid_out(want, order) for _ in range(2)]
    do = a_pass(1, "stochastic")
    for threads, w, mask in zip((1, 1, 3), (want, *got), recorded, strict=True):
        torch.set_num_threads(threads)
        Table([Entry(w, w, 9, 5, 0, MaskKind.RECORD, 0.01, mask)], ["w"], backend).apply(do)
    for w, mask in zip(got, recorded[1:], strict=True):
        assert torch.equal(bits(w), bits(want)) and torch.equal(mask, recorded[0])


def test_the_native_backend_does_all_in_one_call() -> None:
    """So no exception from outside comes in the middle of a pass; of other backends it may."""
    w = laid_out(torch.ones(3, 4), (1, 0))
    assert Table([Entry(w, w, 0)], ["w"], "native").in_c
    assert not Table([Entry(w, w, 0)], ["w"], "reference").in_c


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_add_noise(backend: str) -> None:
    """A mask has a layout of its own, and may be expanded."""
    w = torch.randn(6, 5, 3, 3)
    masks = [torch.rand_like(w) < 0.5, (torch.arange(6) % 2 == 0).view(6, 1, 1, 1).expand_as(w)]
    for mask in (masks[0], laid_out(masks[0], ORDERS["any"]), masks[1], 0.5):
        plain, other = w.clone(), w.to(memory_format=torch.channels_last)
        given = mask.contiguous() if isinstance(mask, torch.Tensor) else mask
        zo.add_noise_([plain], 1, 0.5, masks=[given], backend=backend)
        zo.add_noise_([other], 1, 0.5, masks=[mask], backend=backend)
        assert torch.equal(plain, other) and not torch.equal(plain, w)
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_the_layout_is_part_of_the_memory() -> None:
    w = torch.randn(3, 3)
    table, before = Table([Entry(w, w, 0)], ["w"]), w.clone()
    w.data = w.data.t()
    with pytest.raises(RuntimeError, match="memory was replaced"):
        table.apply(a_pass(1, "nearest"))
    assert torch.equal(w.t(), before)


def test_staging_is_shared_and_bounded() -> None:
    """Of tables one after the other, each of several batches, the memory is that of one batch."""
    staging = staged.Staging()
    tensors = [laid_out(torch.randn(8, 12), (1, 0)) for _ in range(5)]
    for w in tensors:
        Table([Entry(t, t, i) for i, t in enumerate((w, w.clone()))], ["w", "v"], "reference", staging=staging)
    [memory] = staging._memory[torch.device("cpu")]
    assert memory.numel() <= 700 + 63


@pytest.mark.parametrize("most", [1, 8, 20, 100, 10**6])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("shape", [(5, 4, 6), (3, 7), (24,), (1, 9, 2, 8), ()], ids=str)
def test_stretches(shape: tuple[int, ...], multiple: int, most: int) -> None:
    t = torch.arange(math.prod(shape)).view(shape)
    cut = stretches(shape, most, multiple)
    assert torch.equal(torch.cat([t[index].flatten() for _, index in cut]), t.flatten())
    assert [start for start, _ in cut] == [int(t[index].flatten()[0]) for _, index in cut]
    assert all(start % multiple == 0 for start, _ in cut)
    assert multiple > 1 or all(t[index].numel() <= most for _, index in cut)


@pytest.mark.parametrize("most", [10, 1 << 20])
def test_fingerprints(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("zo_kernels.trajectory.fingerprint._STAGED", most)
    w = torch.randn(4, 5, 3, 3)
    want = summed(w, [7])
    for order in (ORDERS["channels_last"], ORDERS["any"]):
        assert torch.equal(summed(laid_out(w, order), [7]), want)


def test_what_is_dense() -> None:
    w = torch.randn(4, 6, 3, 3)
    some = w[:1, :, 1:2, 1:2].clone()  # strides of dimensions of one element say nothing
    others = [some, some.as_strided(some.shape, (1, 1, 9, 9)), torch.randn(24).as_strided((6, 1, 4), (1, 77, 6))]
    for t in (w, w.permute(3, 0, 2, 1), w[1:3], w[:0], w[0, 0, 0, 0], *others):
        assert is_dense(t) and torch.equal(in_memory_order(t).sort().values, t.flatten().sort().values)
    gaps = [w[:, 1:], w[..., ::2], w[::2], w.transpose(0, 1)[1:], w[:1, :1].expand(4, 6, 3, 3)]
    assert not any(map(is_dense, gaps))


WRONG = {
    "a dimension less": (((12,), (1, 3), (1, 3)), r"strides: expected 1 of dst and of src, got 2 and 2"),
    "no strides of src": (((3, 4), (1, 3), ()), r"strides: expected 2 of dst and of src, got 2 and 0"),
    "another size": (((3, 3), (1, 3), (1, 3)), r"shape: expected 12 elements, got 9"),
    "a larger size": (((3, 2**62), (1, 3), (1, 3)), r"shape: expected 12 elements, got more"),
    "a size of 0": (((0, 4), (1, 3), (1, 3)), r"shape: expected at least 1, got 0"),
    "a size of -3": (((-3, -4), (1, 3), (1, 3)), r"shape: expected at least 1, got -"),
    "a gap": (((3, 4), (1, 4), (1, 3)), r"strides of dst: expected a stride of 3, got 4"),
    "elements twice": (((3, 4), (1, 3), (1, 2)), r"strides of src: expected a stride of 3, got 2"),
    "a stride of 0": (((3, 4), (0, 1), (1, 3)), r"strides of dst: expected a stride of 1, got 0"),
    "a stride of -1": (((3, 4), (-1, 3), (1, 3)), r"strides of dst: expected a stride of 1, got -1"),
    "in place, others": (((3, 4), (1, 3), (4, 1)), r"strides of src: expected those of dst, in place, got others"),
    "a stride of 2**62": (((3, 4), (1, 2**62), (1, 3)), r"strides of dst: expected a stride of 3, got 46"),
}


@pytest.mark.skipif(not native.instruction_sets(), reason="the native extension is not built")
@pytest.mark.parametrize("name", WRONG)
def test_native_refuses_strides_that_lead_elsewhere(name: str) -> None:
    w = torch.zeros(3, 4)
    row = (w.data_ptr(), w.data_ptr(), 12, 0, 0, 0, 0, 0, 0.0, 0, 48, 48, 0)
    numbers, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        native._native.Table([row], {0: numbers})
    with pytest.raises(ValueError, match=r"strided: expected indices of the table's 1 entries, got 1"):
        native._native.Table([row], {1: ((3, 4), (1, 3), (1, 3))})


def test_backends_take_no_layout_that_they_do_not_know() -> None:
    w = laid_out(torch.ones(3, 4), (1, 0))
    for name, device in BACKENDS:
        if name not in ("native", *NATIVE):
            with pytest.raises(ValueError, match=r"expected contiguous tensors"):
                backends.resolve(name, device).prepare([Entry(w.to(device), w.to(device), 0)])
    with pytest.raises(ValueError, match=r"expected contiguous tensors, got strides \(1, 3\)"):
        reference.prepare([Entry(w, w, 0)])
    with pytest.raises(ValueError, match=r"w: src: expected the shape of dst, \(3, 4\), got \(4, 3\)"):
        Table([Entry(w, torch.ones(4, 3), 0)], ["w"])
    square = laid_out(torch.ones(3, 3), (1, 0))
    with pytest.raises(ValueError, match=r"w: src: expected other memory than dst, or its strides"):
        Table([Entry(square, square.t(), 0)], ["w"])
    with pytest.raises(ValueError, match=r"w: expected a contiguous tensor for a shard of 3 stretches"):
        Table([Entry(w, w, 0)], ["w"], runs=[[0, 8, 16]])
