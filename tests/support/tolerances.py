"""Every tolerance of these tests, each with where it comes from. What is not here is compared with equality."""

from __future__ import annotations

import math

# ---------------------------------------------------------------------------------------------------------------------
# Statistics. Seeds are fixed, so a test gives one answer for ever; the bounds say how unlucky a good generator may be.

# Standard errors an estimate may be away from its expectation. One normal estimate exceeds 5 with probability 6e-7; a
# few hundred are looked at.
SIGMAS = 5.0

# Kolmogorov's statistic sqrt(n) * D exceeds 1.95 with probability 1e-3 (2 exp(-2 * 1.95^2)).
KOLMOGOROV = 1.95

# Two-sided probability left to each tail of a Poisson or chi-square count.
TAIL_PROBABILITY = 1e-4

# |z - float64 Box-Muller of the same uniforms|, from docs/noise.md. The rounding of u to 24 bits is not in it, but in
# the uniform's definition.
NOISE_ERROR = 1e-5

# The largest |z|: u = 2^-31 gives sqrt(62 ln 2) = 6.5555; plus the error above.
NOISE_MAXIMUM = math.sqrt(62 * math.log(2)) + NOISE_ERROR

# ---------------------------------------------------------------------------------------------------------------------
# Passes over float32 weights. U is half an ulp relative to the number rounded.

U = 2.0**-24


def one_pass(magnitude: float, scales: list[float]) -> float:
    """How far a float32 pass may be from exact arithmetic, for weights up to `magnitude` before and after it.

    decay * w is rounded once, every fma once; decay and the scales were rounded to binary32 before.
    """
    along = sum(abs(s) for s in scales) * NOISE_MAXIMUM
    reach = magnitude + along
    return U * ((2 + len(scales)) * reach + along)


def step_in_place(magnitude: float, eps: float, updates: list[float]) -> float:
    """How far weights may be from exact arithmetic at the end of a step in place, restoring passes included.

    For n directions there are n passes that come from the previous direction (two scales: leave it, enter the next), n
    of one scale -2 eps, and one that leaves the last direction and applies all n updates.
    """
    n = len(updates)
    entering = one_pass(magnitude, [eps, eps])
    crossing = one_pass(magnitude, [2 * eps])
    return n * (entering + crossing) + one_pass(magnitude, [*updates, eps])


def loss_slope(loss_error: float, eps: float) -> float:
    """How far (L+ - L-) / 2 eps may be off if each loss is off by loss_error."""
    return loss_error / eps


def reordered(value: float, terms: int) -> float:
    """How far a float32 value may be off if sums of so many terms on its way, of about its size, are taken in another
    order: each addition is rounded once.
    """
    return 2 * U * terms * abs(value)


# ---------------------------------------------------------------------------------------------------------------------
# SVRG. The statement to hold is "a clear factor": theory for the data of the test gives more than 100.

SHARED_DIRECTION_FACTOR = 10.0

# How far weights in place and in the forward may part in 13 steps at rate 1e-2 and eps 1e-2, 3 estimates a step: an
# estimate is off by loss_slope(reordered(1.5, 2), eps) = 4e-5 along z, |z| < 6.6, with either sign: 39 of one sign, and
# of the largest z, come to 1e-4. One that misses a read is off by 0.1 and more, which is 1e-3 of a weight in one step.
IN_TURN = 1e-4

# ---------------------------------------------------------------------------------------------------------------------
# Memory, in KiB, beyond what stands in the contract. A pass starts threads, whose stacks and arenas take some tens of
# KiB; the kernel counts resident pages per CPU in batches of 32 pages or more, so a high-water mark is good to a few
# hundred KiB.

STEP_MEMORY = 1024
# Fresh pages touched by a call, counted as page faults and therefore exact: less than 64 KiB.
CALL_PAGES = 16

# ---------------------------------------------------------------------------------------------------------------------
# Models in 16 bits.


def of_16_bits(largest: float, mantissa: int, roundings: int, terms: int) -> float:
    """How far a mean of so many terms, computed exactly from logits up to `largest`, may be off if these went through
    so many roundings to so many bits of mantissa, independent of each other.
    """
    return SIGMAS * 2.0 ** -(mantissa + 1) * largest * math.sqrt(roundings / terms)
