"""noise v1 in PyTorch: the reference that every backend agrees with, bit for bit. docs/noise.md is the specification.

Slow and obvious on purpose. Normals have three layers: bits (`philox4x32`, `words`), uniform (in `radius` and
`cos_sin`), normal (`box_muller`, `normal`). Signs (`rademacher`) are single bits of other words. Arithmetic is float32;
32-bit words are int64 tensors with values below 2**32.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

VERSION = "v1"  # noise of which any bit differs is another version
DISTRIBUTIONS = ("normal", "rademacher")

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 7
# The last word of a counter: words of different streams are independent.
NORMAL_STREAM, SIGN_STREAM, SIGN_ROUNDING_STREAM = 0, 1, 2

LOG_SPLIT = 0x3F3504F3  # bits of sqrt(1/2) rounded to binary32
LOG_SPLIT_Y = LOG_SPLIT + (31 << 23)  # the same split for y = u * 2**31
LOG_COEFFICIENTS = (
    -2.00000262260437,
    1.000045895576477,
    -0.6662205457687378,
    0.49748367071151733,
    -0.41031843423843384,
    0.37863919138908386,
    -0.24240337312221527,
)
SIN_COEFFICIENTS = (
    3.141592502593994,
    -5.1677069664001465,
    2.5500314235687256,
    -0.5980451703071594,
    0.0772201269865036,
)
COS_COEFFICIENTS = (
    1.0,
    -4.934795379638672,
    4.058451175689697,
    -1.3320938348770142,
    0.2200806587934494,
)

_MASK32 = 0xFFFFFFFF


def _f32(x: float) -> float:
    """The binary32 nearest to x, as a Python float."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


LOG_EXPONENT_SCALE = _f32(-2.0 * math.log(2.0) / 2**23)
RADIUS_FLOOR = 2.0**-100  # keeps the square of the radius above zero and changes no other value


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[int, int],
    rounds: int = PHILOX_ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of Salmon et al. (SC 2011), on int64 tensors of 32-bit words.

    Args:
        counter: four tensors of one shape, values in [0, 2**32).
        key: two words in [0, 2**32).
        rounds: 7 in noise v1.

    Returns:
        Four int64 tensors of 32-bit words, of the counter's shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # An int64 product wraps, but its 64 bits are those of the unsigned product.
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + PHILOX_W0) & _MASK32, (k1 + PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def _from_bits(bits: Tensor) -> Tensor:
    """int64 words -> float32 with those bits."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def _to_bits(x: Tensor) -> Tensor:
    """float32 -> its bits as int64 words."""
    return x.view(torch.int32).to(torch.int64) & _MASK32


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """float32 fma(a, b, c) = a*b + c, rounded once.

    The product of two binary32 is exact in binary64. The sum is rounded to odd there (with the exact error
    of the addition), after which rounding to binary32 is right: 53 >= 2 * 24 + 2.
    """
    p = a.double() * torch.as_tensor(b, dtype=torch.float32, device=a.device).double()
    c = torch.as_tensor(c, dtype=torch.float32, device=a.device).double()
    s = p + c
    v = s - p
    error = (p - (s - v)) + (c - v)
    bits = s.view(torch.int64)
    even = (bits & 1) == 0
    outwards = (error > 0) == (s > 0)
    odd = torch.where(outwards, bits + 1, bits - 1)
    inexact = (error != 0) & torch.isfinite(s) & torch.isfinite(error)
    return torch.where(inexact & even, odd, bits).view(torch.float64).float()


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = fma(y, x, c)
    return y


def radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u) of the radius word: u = ((word mod 2**31) | 1) / 2**31, float32 (docs/noise.md, 2 and 3)."""
    y = ((word & 0x7FFFFFFF) | 1).to(torch.float32)
    d = _to_bits(y) - LOG_SPLIT_Y
    k = (d & ~0x7FFFFF).to(torch.float32)
    f = _from_bits((d & 0x7FFFFF) + LOG_SPLIT) - 1.0
    # torch.sqrt of float32 is not correctly rounded on every CPU; through float64 it is, since 53 >= 2 * 24 + 2.
    return fma(_horner(LOG_COEFFICIENTS, f), f, fma(k, LOG_EXPONENT_SCALE, RADIUS_FLOOR)).double().sqrt().float()


def cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of pi*t for t in [-1/2, 1/2) from the low 23 bits of the angle word, float32."""
    t = _from_bits((word & 0x7FFFFF) | 0x3F800000) - 1.5
    s = t * t
    return _horner(COS_COEFFICIENTS, s), t * _horner(SIN_COEFFICIENTS, s)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two words."""
    r = radius(radius_word)
    r = torch.where((angle_word >> 31) == 1, -r, r)
    c, s = cos_sin(angle_word)
    return r * c, r * s


def _stream(counter: Tensor, seed: int, param_id: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter."""
    words = (counter & _MASK32, counter >> 32, torch.full_like(counter, param_id), torch.full_like(counter, stream))
    return philox4x32(words, (seed & _MASK32, seed >> 32))


def words(index: Tensor, seed: int, param_id: int) -> tuple[Tensor, Tensor]:
    """The radius and the angle word of each element.

    Args:
        index: int64 element indices in the whole parameter, any shape.
        seed: 64-bit seed of the direction.
        param_id: 32-bit id of the parameter.

    Returns:
        Two int64 tensors of the index's shape; elements 2j and 2j+1 share theirs.
    """
    x0, x1, x2, x3 = _stream(index >> 2, seed, param_id, NORMAL_STREAM)
    second = (index & 2) != 0
    return torch.where(second, x2, x0), torch.where(second, x3, x1)


def normal(index: Tensor, seed: int, param_id: int) -> Tensor:
    """z of each element index, float32, of the index's shape."""
    even, odd = box_muller(*words(index, seed, param_id))
    return torch.where((index & 1) == 0, even, odd)


def rademacher(index: Tensor, seed: int, param_id: int) -> Tensor:
    """z of each element index, -1 or +1 as float32, of the index's shape (docs/noise.md, 8)."""
    word = _chosen(_stream(index >> 7, seed, param_id, SIGN_STREAM), index >> 5)
    bit = word >> (((index & 31) >> 1) + 16 * (index & 1))
    return (1 - 2 * (bit & 1)).float()


def _chosen(words: tuple[Tensor, ...], which: Tensor) -> Tensor:
    """Word `which` mod 4 of each element."""
    return torch.stack(words).gather(0, (which & 3)[None])[0]


def noise(index: Tensor, seed: int, param_id: int, distribution: str) -> Tensor:
    """z of each element index, float32, of the index's shape; `distribution` is one of `DISTRIBUTIONS`."""
    return (normal if distribution == "normal" else rademacher)(index, seed, param_id)


def rounding_bits(index: Tensor, seed: int, param_id: int, distribution: str = "normal") -> Tensor:
    """The 16 random bits that stochastic rounding adds to each element, int64 in [0, 2**16), of the index's shape."""
    if distribution == "rademacher":
        word = _chosen(_stream(index >> 3, seed, param_id, SIGN_ROUNDING_STREAM), index >> 1)
        return (word >> 16 * (index & 1)) & 0xFFFF
    a, b = words(index, seed, param_id)
    h = ((b >> 15) & 0xFF00) | (b & 0xFF)
    return torch.where((index & 1) == 0, h, h ^ (a & 0xFFFF))


def round_stochastic(t: Tensor, rho: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 t to a 16-bit dtype by the random bits rho (docs/noise.md, 5)."""
    bits = _to_bits(t)
    sign, magnitude = (bits >> 31) << 15, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (magnitude + rho) >> 16
        infinity = 0x7F80
    else:
        subnormal = _to_bits(torch.clamp(t.abs(), max=2.0**-14) + 2.0**-14) - 0x38800000  # in units of 2**-37
        rounded = torch.where(
            magnitude >= 0x38800000,
            (((magnitude + (rho >> 3)) >> 13) - 0x1C000).clamp(max=0x7C00),
            (subnormal + (rho >> 3)) >> 13,
        )
        infinity = 0x7C00
    rounded = torch.where(magnitude > 0x7F800000, infinity + 1, rounded)  # NaN stays NaN
    rounded = torch.where(magnitude == 0x7F800000, infinity, rounded) | sign
    return torch.where(rounded >= 2**15, rounded - 2**16, rounded).to(torch.int16).view(dtype)


def round_to(
    t: Tensor,
    dtype: torch.dtype,
    rounding: str,
    index: Tensor,
    seed: int,
    param_id: int,
    distribution: str = "normal",
) -> Tensor:
    """Round float32 t to dtype; `seed` is the first direction's, whose words give the random bits."""
    if dtype == torch.float32 or rounding == "nearest":
        return t.to(dtype)
    return round_stochastic(t, rounding_bits(index, seed, param_id, distribution), dtype)


def mix(x: int) -> int:
    """SplitMix64's finaliser, a bijection of the 64-bit integers."""
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def direction_seed(seed: int, step: int, slot: int) -> int:
    """The seed of direction `slot` of step `step` of a run (docs/noise.md, 6)."""
    return mix(mix(seed) ^ ((step << 20) + slot))
