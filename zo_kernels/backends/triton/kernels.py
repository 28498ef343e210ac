"""The kernel: dst <- round(decay * src + m * sum_k scale_k * z(seed_k)), with noise made in registers.

Arithmetic is float32: one fma a direction, in order, then one rounding to dst's dtype (docs/noise.md, 4).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import gpu_table
from ..types import MaskKind
from .noise import (
    add_signs,
    fma,
    leaf,
    line_of,
    normal,
    of_neighbour,
    round_nearest,
    round_stochastic,
    sign_rounding_bits,
    sign_words,
)

NONE = tl.constexpr(int(MaskKind.NONE))
THRESHOLD = tl.constexpr(int(MaskKind.THRESHOLD))
BOOL = tl.constexpr(int(MaskKind.BOOL))
BITS = tl.constexpr(int(MaskKind.BITS))
RECORD = tl.constexpr(int(MaskKind.RECORD))
FIELDS = tl.constexpr(gpu_table.FIELDS)


@triton.jit
def widen(w, TARGET: tl.constexpr):
    """float32, bfloat16 or float16 to float32, exactly."""
    if w.dtype == tl.bfloat16 and TARGET == "interpreter":  # its own conversion loses subnormals
        return (w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif w.dtype == tl.bfloat16 and TARGET == "cuda":  # ptxas by itself needs two instructions for every second element
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [w], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return w.to(tl.float32)


@triton.jit
def place_in(tensor, block, line, column, LINE: tl.constexpr, ALIGNED: tl.constexpr, SIGNS: tl.constexpr):
    """Pointers to a block's elements."""
    # In this order a thread keeps a pointer for all blocks. Signs leave registers for it, normals do not.
    pointers = tensor + (line + column) + block if SIGNS and ALIGNED else tensor + block + (line + column)
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (16, 16)), (1, LINE))
    return pointers


@triton.jit
def inside_of(first, end, block, line, column, ALIGNED: tl.constexpr):
    """Which of a block's elements are first .. end - 1. In aligned tensors whole lines are, so accesses stay wide."""
    if ALIGNED:
        return (line >= first - block) & (line < end - block)
    else:
        return (line + column >= first - block) & (line + column < end - block)


@triton.jit
def axpy(
    row, chunk, blocks_per_chunk, seeds, scales, decays, directions,
    DISTRIBUTION: tl.constexpr, DTYPE: tl.constexpr, MASK: tl.constexpr, STOCHASTIC: tl.constexpr, DECAY: tl.constexpr,
    IN_PLACE: tl.constexpr, ALIGNED: tl.constexpr, COUNTERS: tl.constexpr, THREADS: tl.constexpr, TARGET: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor, block by block.

    Chunks divide the counters, not the tensor, so that no two programs compute the same words, and all counters of a
    chunk share their high word. The first and the last chunk may stick out of the tensor. Places in a chunk fit 32
    bits, places in a tensor do not.

    Args:
        row: pointer to the tensor's row of the table, see `gpu_table`.
        chunk: int32, counted from the first that the tensor touches.
        seeds: pointer to `directions` uint64; scales, decays: to float32 (groups, directions) and (groups,).
        DISTRIBUTION: of z, "normal" or "rademacher".
        DTYPE: of the weights.
        DECAY: False if all decays are 1.
        IN_PLACE: True only if dst and src are the same.
        ALIGNED: whether numel and offset are multiples of 8, and dst and src of 16 bytes.
        THREADS: in a program. They change where the words of signs are made, and no bit.
        TARGET: "cuda", "hip" or "interpreter".
        PREFETCH: whether a block's weights are loaded while the noise of the one before is made.
    """
    numel, offset = tl.load(row + 3), tl.load(row + 4)
    size = (4 * COUNTERS) * blocks_per_chunk
    start = chunk.to(tl.int64) * size - (offset & (size - 1))  # of the chunk in the tensor, maybe negative
    weights = tl.load(row).to(tl.pointer_type(DTYPE)) + start
    sources = weights if IN_PLACE else tl.load(row + 1).to(tl.pointer_type(DTYPE)) + start
    mask = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    # The chunk's elements first .. end - 1 lie in the tensor.
    first = tl.maximum(-start, 0).to(tl.int32)
    end = tl.minimum(numel - start, size).to(tl.int32)

    param_id, group = halves(row + 5)
    threshold = tl.load((row + 6).to(tl.pointer_type(tl.float32)))
    # Read as two words: if they were shifted out of a 64-bit one, the compiler would widen the first round's xor.
    k0, k1 = halves(seeds)
    scales += group.to(tl.int64) * directions
    scale = tl.load(scales)
    decay = tl.load(decays + group.to(tl.int32))
    SIGNS: tl.constexpr = DISTRIBUTION == "rademacher"
    SHIFT: tl.constexpr = 7 if SIGNS else 2
    counter = (start + offset) >> SHIFT
    counter_low, c_hi = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)

    # A line is one 128-bit access. Of normals, it has the elements of one counter if they have 32 bits, else of two.
    LINE: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    LINES: tl.constexpr = 4 * COUNTERS // LINE
    # Of signs, a thread has a slot, and in each row a line of it: see `line_of`.
    ROWS: tl.constexpr = max(1, min(16 // LINE, LINES // THREADS)) if SIGNS else 1
    SLOTS: tl.constexpr = LINES // ROWS
    lines = tl.arange(0, LINES)
    if SIGNS:
        lines = line_of(lines // SLOTS, lines % SLOTS, ROWS)
        counters = counter_low | (LINE * line_of(0, tl.arange(0, SLOTS), ROWS) >> SHIFT).to(tl.uint32)
    else:
        counters = counter_low | (lines * (LINE // 4)).to(tl.uint32)
    line = LINE * lines[:, None]
    column = tl.arange(0, LINE)[None, :]

    begin = first // (4 * COUNTERS) * (4 * COUNTERS)
    if PREFETCH:
        following = tl.load(
            place_in(sources, begin, line, column, LINE, ALIGNED, SIGNS),
            mask=inside_of(first, end, begin, line, column, ALIGNED),
        )
    for block in range(begin, end, 4 * COUNTERS):
        dst = place_in(weights, block, line, column, LINE, ALIGNED, SIGNS)
        inside = inside_of(first, end, block, line, column, ALIGNED)
        if PREFETCH:
            old = following
        else:
            old = tl.load(place_in(sources, block, line, column, LINE, ALIGNED, SIGNS), mask=inside)
        w = widen(old, TARGET)

        c_lo = counters | tl.cast(block >> SHIFT, tl.uint32)
        # The first direction stands apart because its words round the result.
        if SIGNS:
            x0, x1, x2, x3 = sign_words(c_lo, c_hi, param_id, k0, k1, TARGET)
            t = add_signs(decay * w if DECAY else w, scale, x0, x1, x2, x3)
            t = add_further_signs(t, c_lo, c_hi, param_id, seeds, scales, directions, TARGET)
            if STOCHASTIC:
                index = start + offset + block
                rounding = (index >> 3).to(tl.uint32) | lines.to(tl.uint32)
                rho = sign_rounding_bits(rounding, (index >> 35).to(tl.uint32), param_id, k0, k1, TARGET)
        else:
            z, rho = normal(c_lo, c_hi, param_id, k0, k1, LINE, TARGET)
            t = fma(scale, z, decay * w if DECAY else w, TARGET)
            for k in range(1, directions):
                more0, more1 = halves(seeds + k)
                z, _ = normal(c_lo, c_hi, param_id, more0, more1, LINE, TARGET)
                t = fma(tl.load(scales + k), z, t, TARGET)

        new = round_stochastic(t, rho, old.dtype) if STOCHASTIC else round_nearest(t, old.dtype, TARGET)

        if MASK != NONE:
            place = start + block
            if MASK == BOOL:
                flags = mask + place + (line + column)
                if ALIGNED:
                    flags = tl.max_contiguous(tl.multiple_of(flags, (LINE, LINE)), (1, LINE))
                keep = tl.load(flags, mask=inside) != 0
            elif MASK == BITS:
                if ALIGNED:  # then one byte serves a line
                    bits, bit = tl.load(mask + (place >> 3) + (line >> 3), mask=inside), (line & 7) + column
                else:
                    places = place + line + column
                    bits, bit = tl.load(mask + (places >> 3), mask=inside), places & 7
                keep = (bits >> bit.to(tl.uint8)) & 1 != 0
            else:
                keep = tl.abs(w) <= threshold
            if MASK == RECORD:
                byte = tl.arange(0, COUNTERS // 2)
                if SIGNS:
                    at = byte * (8 // LINE)
                    byte = line_of(at // SLOTS, at % SLOTS, ROWS) // (8 // LINE)
                wanted = (8 * byte >= first - block) & (8 * byte < end - block)
                tl.store(mask + (place >> 3) + byte, pack_bits(keep), mask=wanted)
            new = tl.where(keep, new, old)
        if PREFETCH:
            following = tl.load(
                place_in(sources, block + 4 * COUNTERS, line, column, LINE, ALIGNED, SIGNS),
                mask=inside_of(first, end, block + 4 * COUNTERS, line, column, ALIGNED),
            )
        tl.store(dst, new, mask=inside)


@triton.jit
def add_further_signs(t, c_lo, c_hi, param_id, seeds, scales, directions, TARGET: tl.constexpr):
    """t + sum_k scale_k * z_k over all directions but the first, one after the other: see `add_signs`.

    Eight neighbouring slots have one counter. So of eight directions, each makes the words of one, for all of them.
    """
    slot = tl.arange(0, c_lo.shape[0])
    for k in range(1, directions, 8):
        mine = tl.minimum(k + (slot & 7), directions - 1)
        k0, k1 = halves(seeds + mine)
        x0, x1, x2, x3 = sign_words(c_lo, c_hi, param_id, k0, k1, TARGET)
        scale = tl.load(scales + mine)
        for j in range(tl.minimum(directions - k, 8)):
            words = of_neighbour(x0, j), of_neighbour(x1, j), of_neighbour(x2, j), of_neighbour(x3, j)
            t = add_signs(t, of_neighbour(scale, j), *words)
    return t


@leaf
def halves(address):
    """The two uint32 words at a pointer to 64 bits, the low one first; or at each of several."""
    words = address.to(tl.pointer_type(tl.uint32))
    return tl.load(words), tl.load(words + 1)


@triton.jit
def pack_bits(keep):
    """A block of bool -> (numel / 8,) uint8, lowest bit first."""
    weights = 1 << tl.arange(0, 8)[None, :]
    return tl.sum(tl.reshape(keep.to(tl.int32), (keep.numel // 8, 8)) * weights, axis=1).to(tl.uint8)


@triton.jit(
    do_not_specialize=["active", "blocks_per_chunk", "directions"],
    do_not_specialize_on_alignment=["rows", "ids", "first_chunk", "seeds", "scales", "decays"],
)
def axpy_kernel(
    rows, ids, first_chunk, active: tl.int32, blocks_per_chunk: tl.int32, seeds, scales, decays, directions: tl.int32,
    DISTRIBUTION: tl.constexpr, DTYPE: tl.constexpr, MASK: tl.constexpr, STOCHASTIC: tl.constexpr, DECAY: tl.constexpr,
    IN_PLACE: tl.constexpr, ALIGNED: tl.constexpr, COUNTERS: tl.constexpr, THREADS: tl.constexpr, TARGET: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """axpy on the program's chunk; see `gpu_table`."""
    chunk = tl.program_id(0)
    low, high = 0, active
    while high - low > 1:  # first_chunk[low] <= chunk < first_chunk[high]
        middle = (low + high) // 2
        right = tl.load(first_chunk + middle) <= chunk
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    row = rows + FIELDS * tl.load(ids + low).to(tl.int64)
    axpy(
        row, chunk - tl.load(first_chunk + low), blocks_per_chunk, seeds, scales, decays, directions,
        DISTRIBUTION, DTYPE, MASK, STOCHASTIC, DECAY, IN_PLACE, ALIGNED, COUNTERS, THREADS, TARGET, PREFETCH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["numel"], do_not_specialize_on_alignment=["src", "mask"])
def record_kernel(src, mask, threshold: tl.float32, numel: tl.int64, BLOCK: tl.constexpr, TARGET: tl.constexpr):
    """mask[i // 8] bit i % 8 <- |src[i]| <= threshold, and 0 past numel; BLOCK elements a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    keep = (tl.abs(widen(tl.load(src + i, mask=i < numel), TARGET)) <= threshold) & (i < numel)
    byte = (start >> 3) + tl.arange(0, BLOCK // 8)
    tl.store(mask + byte, pack_bits(keep), mask=8 * byte < numel)
