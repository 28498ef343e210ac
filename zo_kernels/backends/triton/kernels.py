"""The kernel: dst <- round(decay * src + m * sum_k scale_k * z(seed_k)), noise regenerated in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..types import MaskKind
from .noise import fma, normal, round_nearest, round_stochastic

NONE = tl.constexpr(int(MaskKind.NONE))
THRESHOLD = tl.constexpr(int(MaskKind.THRESHOLD))
BOOL = tl.constexpr(int(MaskKind.BOOL))
BITS = tl.constexpr(int(MaskKind.BITS))
RECORD = tl.constexpr(int(MaskKind.RECORD))


@triton.jit
def widen(w, TARGET: tl.constexpr):
    """A float of any of the three types to float32, exactly."""
    if w.dtype == tl.bfloat16 and TARGET == "interpreter":  # whose own conversion loses subnormals
        return (w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return w.to(tl.float32)


@triton.jit
def axpy(
    dst, src, mask, threshold, numel, offset, param_id, seeds, scales, decay, directions, block,
    MASK: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, COUNTERS: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """One block of one tensor.

    Blocks divide the counters, not the tensor: a block is COUNTERS consecutive ones from a multiple of COUNTERS on.
    So no two programs make the same words, and the high counter word is one for the whole block. The first and the
    last block may stick out of the tensor.

    Args:
        dst, src: pointers to numel weights of one dtype.
        mask: pointer to uint8, one an element (BOOL) or one for eight (BITS, RECORD).
        threshold, decay: float32 scalars.
        numel, offset, block: int64 scalars; the block's index is among those that the tensor touches.
        param_id: uint32 scalar.
        seeds, scales: pointers to `directions` uint64 and float32.
        ALIGNED: whether numel and offset are multiples of 8, and dst and src of 16 bytes.
        TARGET: "cuda", "hip" or "interpreter".
    """
    # A row is one 128-bit access: one counter's elements if they have 32 bits, two counters' if they have 16.
    ROW: tl.constexpr = 128 // dst.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = 4 * COUNTERS // ROW
    start = block * (4 * COUNTERS) - (offset & (4 * COUNTERS - 1))  # of the block in the tensor, maybe negative
    counter = (start + offset) >> 2

    row = ROW * tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, ROW)[None, :]
    first = tl.maximum(-start, 0).to(tl.int32)
    end = tl.minimum(numel - start, 4 * COUNTERS).to(tl.int32)
    dst += start + (row + column)
    src += start + (row + column)
    if ALIGNED:
        dst = tl.max_contiguous(tl.multiple_of(dst, (16, 16)), (1, ROW))
        src = tl.max_contiguous(tl.multiple_of(src, (16, 16)), (1, ROW))
        inside = (row >= first) & (row < end)  # whole rows, which keeps the accesses wide
    else:
        inside = (row + column >= first) & (row + column < end)
    old = tl.load(src, mask=inside)
    w = widen(old, TARGET)

    c_lo = counter.to(tl.uint32) | (tl.arange(0, ROWS) * (ROW // 4)).to(tl.uint32)
    c_hi = (counter >> 32).to(tl.uint32)
    # The first direction stands before the loop because its words round the result.
    z, rho = normal(c_lo, c_hi, param_id, seeds, ROW, TARGET)
    t = fma(tl.load(scales), z, decay * w, TARGET)
    for k in range(1, directions):
        z, _ = normal(c_lo, c_hi, param_id, seeds + k, ROW, TARGET)
        t = fma(tl.load(scales + k), z, t, TARGET)

    new = round_stochastic(t, rho, old.dtype) if STOCHASTIC else round_nearest(t, old.dtype, TARGET)

    if MASK != NONE:
        if MASK == BOOL:
            keep = tl.load(mask + start + (row + column), mask=inside) != 0
        elif MASK == BITS:
            if ALIGNED:  # then one byte serves a row
                bits, bit = tl.load(mask + (start >> 3) + (row >> 3), mask=inside), (row & 7) + column
            else:
                bits, bit = tl.load(mask + ((start + row + column) >> 3), mask=inside), (start + row + column) & 7
            keep = (bits >> bit.to(tl.uint8)) & 1 != 0
        else:
            keep = tl.abs(w) <= threshold
        if MASK == RECORD:
            tl.static_assert(ALIGNED, "blocks of an unaligned tensor share bytes of mask bits")
            byte = tl.arange(0, COUNTERS // 2)
            tl.store(mask + (start >> 3) + byte, pack_bits(keep), mask=(8 * byte >= first) & (8 * byte < end))
        new = tl.where(keep, new, old)
    tl.store(dst, new, mask=inside)


@triton.jit
def pack_bits(keep):
    """A block of bool -> (numel / 8,) uint8, lowest bit first."""
    weights = 1 << tl.arange(0, 8)[None, :]
    return tl.sum(tl.reshape(keep.to(tl.int32), (keep.numel // 8, 8)) * weights, axis=1).to(tl.uint8)


@triton.jit(
    do_not_specialize=["numel", "offset", "param_id", "group", "directions"],
    do_not_specialize_on_alignment=["dst", "src", "mask", "seeds", "scales", "decays"],
)
def axpy_kernel(
    dst, src, mask, threshold: tl.float32, numel: tl.int64, offset: tl.int64, param_id: tl.uint32, group: tl.int32,
    seeds, scales, decays, directions: tl.int32,
    MASK: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, COUNTERS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """axpy on the block of each program; row `group` of scales (groups, directions) and decays (groups,) applies."""
    axpy(
        dst, src, mask, threshold, numel.to(tl.int64), offset.to(tl.int64), param_id.to(tl.uint32),
        seeds, scales + group * directions, tl.load(decays + group), directions, tl.program_id(0).to(tl.int64),
        MASK, STOCHASTIC, ALIGNED, COUNTERS, TARGET,
    )  # fmt: skip


@triton.jit(do_not_specialize=["numel"], do_not_specialize_on_alignment=["src", "mask"])
def record_kernel(src, mask, threshold: tl.float32, numel: tl.int64, BLOCK: tl.constexpr, TARGET: tl.constexpr):
    """mask[i // 8] bit i % 8 <- |src[i]| <= threshold, and 0 past numel; BLOCK elements a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    keep = (tl.abs(widen(tl.load(src + i, mask=i < numel), TARGET)) <= threshold) & (i < numel)
    byte = (start >> 3) + tl.arange(0, BLOCK // 8)
    tl.store(mask + byte, pack_bits(keep), mask=8 * byte < numel)
