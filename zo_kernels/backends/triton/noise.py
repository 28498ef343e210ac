"""noise v1 on a GPU: Philox4x32-7 -> Box-Muller or signs -> rounding, as Triton device functions.

docs/noise.md is the specification and zo_kernels/spec.py the reference; operations have the same order. Arithmetic is
float32, and every fused multiply-add is written out.
"""

import triton
import triton.language as tl

from ... import spec

ROUNDS = tl.constexpr(spec.PHILOX_ROUNDS)
NORMAL_STREAM, SIGN_STREAM = tl.constexpr(spec.NORMAL_STREAM), tl.constexpr(spec.SIGN_STREAM)
SIGN_ROUNDING_STREAM = tl.constexpr(spec.SIGN_ROUNDING_STREAM)
M0, M1 = tl.constexpr(spec.PHILOX_M0), tl.constexpr(spec.PHILOX_M1)
W0, W1 = tl.constexpr(spec.PHILOX_W0), tl.constexpr(spec.PHILOX_W1)
SPLIT, SPLIT_Y = tl.constexpr(spec.LOG_SPLIT), tl.constexpr(spec.LOG_SPLIT_Y)
EXPONENT_SCALE, FLOOR = tl.constexpr(spec.LOG_EXPONENT_SCALE), tl.constexpr(spec.RADIUS_FLOOR)
P0, P1, P2, P3, P4, P5, P6 = (tl.constexpr(c) for c in spec.LOG_COEFFICIENTS)
S0, S1, S2, S3, S4 = (tl.constexpr(c) for c in spec.SIN_COEFFICIENTS)
C0, C1, C2, C3, C4 = (tl.constexpr(c) for c in spec.COS_COEFFICIENTS)
# The interpreter's fma rounds twice before this version.
INTERPRETED_FMA = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))


def leaf(function):
    """`triton.jit` for small functions, a plain call in the interpreter, whose own call costs more than the work."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


@triton.jit
def cuda_product(x, M: tl.constexpr):
    """Low and high word of uint32 x * M in one instruction; ptxas by itself sometimes adds a zero to it."""
    return tl.inline_asm_elementwise(
        f"{{ .reg .b64 p; mul.wide.u32 p, $2, {M}; mov.b64 {{$0, $1}}, p; }}", "=r,=r,r", [x],
        dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@leaf
def product(x, M: tl.constexpr, TARGET: tl.constexpr):
    """Low and high word of uint32 x * M."""
    if TARGET == "cuda":
        low, high = cuda_product(x, M)
    else:
        p = x.to(tl.uint64) * M
        low, high = p.to(tl.uint32), (p >> 32).to(tl.uint32)
    return low, high


@leaf
def philox4x32(c_lo, c_hi, param_id, k0, k1, STREAM: tl.constexpr, TARGET: tl.constexpr):
    """Four uint32 words of c_lo's shape; the other counter words are uint32 scalars, the key too or of that shape.

    With three of the four counter words uniform, the first round and a half cost next to nothing.
    """
    x0, x1, x2, x3 = c_lo, c_hi, param_id, tl.full((), STREAM, tl.uint32)
    for r in tl.static_range(ROUNDS):
        l0, h0 = product(x0, M0, TARGET)
        l1, h1 = product(x2, M1, TARGET)
        # Uniform words are combined first.
        x0 = h1 ^ (x1 ^ k0)
        x2 = (h0 ^ k1) ^ x3 if r == 1 else h0 ^ (x3 ^ k1)
        x1, x3 = l1, l0
        k0 += W0
        k1 += W1
    return x0, x1, x2, x3


@triton.jit
def cuda_and_or(x, AND: tl.constexpr, OR: tl.constexpr):
    """(x & AND) | OR of uint32 x in one instruction, where ptxas by itself spends two."""
    return tl.inline_asm_elementwise(
        f"lop3.b32 $0, $1, {AND}, {OR}, 0xEA;", "=r,r", [x], dtype=tl.uint32, is_pure=True, pack=1
    )


@leaf
def fma(x, y, z, TARGET: tl.constexpr):
    """float32 x * y + z, rounded once."""
    if TARGET == "interpreter" and not INTERPRETED_FMA:  # in float64 as spec.fma, by rounding to odd
        product = tl.cast(x, tl.float32).to(tl.float64) * tl.cast(y, tl.float32).to(tl.float64)
        addend = tl.cast(z, tl.float32).to(tl.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        odd = tl.where((error > 0) == (total > 0), bits + 1, bits - 1)
        # The error of an infinity is NaN.
        to_odd = (tl.abs(error) > 0) & (tl.abs(error) < float("inf")) & ((bits & 1) == 0)
        return tl.where(to_odd, odd, bits).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def cuda_sqrt(x):
    """Correctly rounded square root of float32 x, which is 2**-100 or lies in [2**-25, 2**6].

    This is ptxas's own sqrt.rn.f32 without its branch for other x.
    """
    y = tl.math.rsqrt(x)
    root = x * y
    return tl.fma(tl.fma(-root, root, x), y * 0.5, root)


@leaf
def box_muller(a, b, TARGET: tl.constexpr):
    """Two float32 normals (even, odd) from the uint32 radius words a and angle words b."""
    if TARGET == "cuda":
        y, t = cuda_and_or(a, 0x7FFFFFFF, 1), cuda_and_or(b, 0x7FFFFF, 0x3F800000)
    else:
        y, t = (a & 0x7FFFFFFF) | 1, (b & 0x7FFFFF) | 0x3F800000

    y = y.to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    k = (y - SPLIT_Y) & -0x800000
    # With d = y - SPLIT_Y, this is (d mod 2**23) + SPLIT of docs/noise.md as one addition of three terms.
    f = (y - k - (SPLIT_Y - SPLIT)).to(tl.float32, bitcast=True) - 1.0
    p = fma(fma(fma(P6, f, P5, TARGET), f, P4, TARGET), f, P3, TARGET)
    p = fma(fma(fma(p, f, P2, TARGET), f, P1, TARGET), f, P0, TARGET)
    r = fma(p, f, fma(k.to(tl.float32), EXPONENT_SCALE, FLOOR, TARGET), TARGET)
    r = cuda_sqrt(r) if TARGET == "cuda" else tl.sqrt_rn(r)
    r = (r.to(tl.uint32, bitcast=True) | (b & 0x80000000)).to(tl.float32, bitcast=True)

    t = t.to(tl.float32, bitcast=True) - 1.5
    s = t * t
    cosine = fma(fma(fma(fma(C4, s, C3, TARGET), s, C2, TARGET), s, C1, TARGET), s, C0, TARGET)
    sine = t * fma(fma(fma(fma(S4, s, S3, TARGET), s, S2, TARGET), s, S1, TARGET), s, S0, TARGET)
    return r * cosine, r * sine


@leaf
def four(c_lo, c_hi, param_id, k0, k1, TARGET: tl.constexpr):
    """The four float32 normals of each counter, then their four uint32 rounding bits in [0, 2**16)."""
    x0, x1, x2, x3 = philox4x32(c_lo, c_hi, param_id, k0, k1, NORMAL_STREAM, TARGET)
    z0, z1 = box_muller(x0, x1, TARGET)
    z2, z3 = box_muller(x2, x3, TARGET)
    h0 = ((x1 >> 15) & 0xFF00) | (x1 & 0xFF)
    h2 = ((x3 >> 15) & 0xFF00) | (x3 & 0xFF)
    return z0, z1, z2, z3, h0, h0 ^ (x0 & 0xFFFF), h2, h2 ^ (x2 & 0xFFFF)


@triton.jit
def normal(c_lo, c_hi, param_id, k0, k1, LINE: tl.constexpr, TARGET: tl.constexpr):
    """z of LINE = 4 or 8 consecutive elements, and the bits that stochastic rounding adds to them.

    Args:
        c_lo: uint32 (lines,), low words of the lines' first counters; even if LINE is 8.
        c_hi, param_id: uint32 scalars, the other counter words.
        k0, k1: uint32 scalars, the direction's seed.

    Returns:
        float32 (lines, LINE); uint32 (lines, LINE) in [0, 2**16).
    """
    # Everything keeps the layout of c_lo until here. Words joined before the polynomials would first have to
    # change their layout, through shared memory.
    z0, z1, z2, z3, h0, h1, h2, h3 = four(c_lo, c_hi, param_id, k0, k1, TARGET)
    if LINE == 8:
        z4, z5, z6, z7, h4, h5, h6, h7 = four(c_lo | 1, c_hi, param_id, k0, k1, TARGET)
        z0, z1, z2, z3 = tl.join(z0, z4), tl.join(z1, z5), tl.join(z2, z6), tl.join(z3, z7)
        h0, h1, h2, h3 = tl.join(h0, h4), tl.join(h1, h5), tl.join(h2, h6), tl.join(h3, h7)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    rho = tl.join(tl.join(h0, h2), tl.join(h1, h3))
    shape: tl.constexpr = (c_lo.shape[0], LINE)
    return tl.reshape(z, shape), tl.reshape(rho, shape)


@leaf
def line_of(row, slot, ROWS: tl.constexpr):
    """Which line of a block is a slot's in a row, under signs.

    All lines of a slot, which is a thread's, are of one counter. The lines of eight slots in a row are neighbours, so
    that one access of a warp is to whole stretches of 128 bytes.
    """
    return (slot >> 3) * (8 * ROWS) + 8 * row + (slot & 7)


@leaf
def sign_words(c_lo, c_hi, param_id, k0, k1, TARGET: tl.constexpr):
    """The four uint32 words of each counter's 128 signs, as four tensors of c_lo's shape."""
    return philox4x32(c_lo, c_hi, param_id, k0, k1, SIGN_STREAM, TARGET)


@triton.jit
def in_lines(x, ROWS: tl.constexpr):
    """(1 or ROWS, slots) -> (lines, 1): what each line gets of its slot."""
    x = tl.broadcast_to(x, (ROWS, x.shape[-1]))
    return tl.reshape(x, (x.numel, 1))


@triton.jit
def add_signs(t, scale, x0, x1, x2, x3):
    """t + scale * z, rounded once: the fma of docs/noise.md, since z is -1 or 1.

    Args:
        t: float32 (lines, LINE).
        scale: float32 scalar, or (slots,) that are equal.
        x0, x1, x2, x3: uint32 (slots,), words of the counter that all lines of a slot have, see `line_of`.
    """
    LINE: tl.constexpr = t.shape[1]
    SLOTS: tl.constexpr = x0.shape[0]
    ROWS: tl.constexpr = t.shape[0] // SLOTS
    first = LINE * line_of(tl.arange(0, ROWS)[:, None], tl.arange(0, SLOTS)[None, :], ROWS)
    even = tl.where((first & 64) != 0, x2[None, :], x0[None, :])
    odd = tl.where((first & 64) != 0, x3[None, :], x1[None, :])
    # One shift a line brings its first two signs into bits 0 and 16, so that those of the elements are constants.
    word = tl.where((first & 32) != 0, odd, even) >> ((first & 31) >> 1).to(tl.uint32)
    column = tl.arange(0, LINE)[None, :]
    sign = (in_lines(word, ROWS) << (31 - (column >> 1) - 16 * (column & 1)).to(tl.uint32)) & 0x80000000
    scale = scale.to(tl.uint32, bitcast=True)
    if len(scale.shape) == 1:
        scale = in_lines(scale[None, :], ROWS)
    return t + (sign ^ scale).to(tl.float32, bitcast=True)


@triton.jit
def of_neighbour(x, which):
    """Of each eight neighbours in x, all get the value of one. On a GPU these are eight threads of a warp."""
    eights: tl.constexpr = (x.shape[0] // 8, 8)
    return tl.reshape(tl.gather(tl.reshape(x, eights), tl.full(eights, 0, tl.int32) + which, 1), x.shape)


@triton.jit
def sign_rounding_bits(c_lo, c_hi, param_id, k0, k1, TARGET: tl.constexpr):
    """The bits that stochastic rounding adds to the eight elements of each counter, under signs.

    Args:
        c_lo: uint32 (lines,).
        c_hi, param_id, k0, k1: uint32 scalars; the key is the first direction's seed.

    Returns:
        uint32 (lines, 8) in [0, 2**16).
    """
    x0, x1, x2, x3 = philox4x32(c_lo, c_hi, param_id, k0, k1, SIGN_ROUNDING_STREAM, TARGET)
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (c_lo.shape[0], 8))


@triton.jit
def round_nearest(t, dtype: tl.constexpr, TARGET: tl.constexpr):
    """float32 t to dtype, ties to even."""
    if dtype == tl.bfloat16 and TARGET == "interpreter":  # its own conversion truncates
        bits = t.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(t == t, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return t.to(dtype)


@triton.jit
def round_stochastic(t, rho, dtype: tl.constexpr):
    """float32 t to a 16-bit dtype by the random bits rho; t is the result of an fma, so its NaN are quiet."""
    if dtype == tl.bfloat16:
        # As signed integers, only NaN are larger. A GPU's NaN, 0x7fffffff, plus rho would carry into the sign bit.
        bits = tl.minimum(t.to(tl.int32, bitcast=True), 0x7FC00000).to(tl.uint32, bitcast=True)
        rounded = (bits + rho) >> 16
    else:
        # The product turns float16's subnormals into float32's, and rounds as docs/noise.md's addition of 2**-14 does.
        magnitude = tl.minimum(tl.abs(t), 65536.0, propagate_nan=tl.PropagateNan.ALL) * 2.0**-112
        scaled = tl.minimum(magnitude.to(tl.uint32, bitcast=True), 0x0FFFDFFF) << 3  # a NaN stays above infinity
        rounded = ((scaled + rho) >> 16) | ((t.to(tl.uint32, bitcast=True) >> 16) & 0x8000)
    return rounded.to(tl.uint16).to(dtype, bitcast=True)
