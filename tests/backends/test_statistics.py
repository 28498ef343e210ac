"""The quality of noise v1, measured on what the native backend makes. Opt-in runs at the end take minutes."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import KOLMOGOROV, NOISE_ERROR, NOISE_MAXIMUM, SIGMAS, TAIL_PROBABILITY

import zo_kernels as zo
from zo_kernels import _native
from zo_kernels.spec import box_muller, direction_seed, rounding_bits, words

scipy_stats = pytest.importorskip("scipy.stats")

N = 1 << 20
SEED, ID = 20240229, 0x9E3779B9

# ---------------------------------------------------------------------------------------------------------------------
# Statistics of a sample, each as (value, expectation, standard error).


def moments(n: int, sums: list[float]) -> dict[str, tuple[float, float, float]]:
    """From the sums of z, z^2, z^3, z^4. Errors are those of the raw moments of a standard normal: Var z^k / n."""
    raw = [s / n for s in sums]
    variances = [1, 2, 15, 96]  # of z, z^2, z^3, z^4
    expected = [0, 1, 0, 3]
    names = ["mean", "variance", "skew", "kurtosis"]
    return {name: (m, e, math.sqrt(v / n)) for name, m, e, v in zip(names, raw, expected, variances, strict=True)}


def power_sums(z: torch.Tensor) -> torch.Tensor:
    z = z.double()
    square = z * z
    return torch.stack([z.sum(), square.sum(), (square * z).sum(), (square * square).sum()])


def assert_within(statistics: dict[str, tuple[float, float, float]]) -> None:
    away = {name: (value - expected) / error for name, (value, expected, error) in statistics.items()}
    assert all(abs(a) < SIGMAS for a in away.values()), f"standard errors away: {away}"


def kolmogorov(z: torch.Tensor) -> float:
    """sqrt(n) * sup |F_n - Phi|, exactly."""
    cdf = torch.special.ndtr(z.sort().values.double())
    n = len(cdf)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - cdf).max().item(), (cdf - steps[:-1]).max().item())


def assert_poisson(count: int, expected: float) -> None:
    low, high = scipy_stats.poisson.interval(1 - 2 * TAIL_PROBABILITY, expected)
    assert low <= count <= high, f"{count} not in [{low}, {high}], expected {expected:.1f}"


def assert_uniform(counts: torch.Tensor) -> None:
    """Chi-square of cells of equal probability, both tails: too even a spread is as wrong."""
    counts = counts.double().flatten()
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    p = scipy_stats.chi2.sf(statistic, len(counts) - 1)
    assert TAIL_PROBABILITY < p < 1 - TAIL_PROBABILITY, f"chi-square {statistic:.1f}, {len(counts)} cells: p = {p:.2g}"


def beyond(sigma: float) -> float:
    """P(|z| > sigma)."""
    return math.erfc(sigma / math.sqrt(2))


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return zo.noise(N, seed=SEED, param_id=ID)


# ---------------------------------------------------------------------------------------------------------------------
# The normal itself.

STREAMS = {
    "one direction": lambda n: zo.noise(n, seed=SEED, param_id=ID),
    "all zero": lambda n: zo.noise(n, seed=0, param_id=0),
    "all ones, far out": lambda n: zo.noise(n, seed=2**64 - 1, param_id=2**32 - 1, offset=2**63 - 1 - n),
    "first of many tensors": lambda n: torch.cat([zo.noise(64, seed=SEED, param_id=i) for i in range(n // 64)]),
    "first of many steps": lambda n: torch.cat([zo.noise(64, seed=direction_seed(0, i, 0)) for i in range(n // 64)]),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_moments_and_distribution(stream: str) -> None:
    n = N if stream == "one direction" else N // 4
    z = STREAMS[stream](n)
    assert_within(moments(n, power_sums(z).tolist()))
    for part in (z, z[0::4], z[1::4], z[2::4], z[3::4]):  # each output of Philox makes its own element
        assert kolmogorov(part) < KOLMOGOROV


def test_tails() -> None:
    z = zo.noise(1 << 23, seed=SEED, param_id=ID)
    z = z[z.abs() > 3.0]
    for sigma in (3.0, 3.5, 4.0, 4.5, 5.0):
        assert_poisson(int((z > sigma).sum()), 2**23 * beyond(sigma) / 2)
        assert_poisson(int((z < -sigma).sum()), 2**23 * beyond(sigma) / 2)


def lagged(lag: int):
    return lambda z: (z[:-lag], z[lag:])


PAIRS = {
    "members of a pair": lambda z: (z[0::2], z[1::2]),
    "pairs of a counter": lambda z: (z.view(-1, 4)[:, :2].flatten(), z.view(-1, 4)[:, 2:].flatten()),
    **{f"lag {lag}": lagged(lag) for lag in (*range(1, 9), 4096)},
    "seed + 1": lambda z: (z, zo.noise(N, seed=SEED + 1, param_id=ID)),
    "seed + 2**32": lambda z: (z, zo.noise(N, seed=SEED + 2**32, param_id=ID)),
    "seed with another top bit": lambda z: (z, zo.noise(N, seed=SEED ^ 2**63, param_id=ID)),
    "param id + 1": lambda z: (z, zo.noise(N, seed=SEED, param_id=ID + 1)),
    "param id with another top bit": lambda z: (z, zo.noise(N, seed=SEED, param_id=ID ^ 2**31)),
    "seed and param id exchanged": lambda z: (z, zo.noise(N, seed=ID, param_id=SEED)),
    "index + 2**34": lambda z: (z, zo.noise(N, seed=SEED, param_id=ID, offset=2**34)),
    "next direction": lambda z: (
        zo.noise(N, seed=direction_seed(SEED, 0, 0)),
        zo.noise(N, seed=direction_seed(SEED, 0, 1)),
    ),
    "next step": lambda z: (
        zo.noise(N, seed=direction_seed(SEED, 0, 0)),
        zo.noise(N, seed=direction_seed(SEED, 1, 0)),
    ),
}
# Powers whose correlations are looked at: those of the values alone miss what Box-Muller could leave between the sizes.
POWERS = [(1, 1), (2, 2), (1, 2), (3, 3)]


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = (v.double() - v.mean(dtype=torch.float64) for v in (x, y))
    return ((x @ y) / torch.sqrt((x @ x) * (y @ y))).item()


@pytest.mark.parametrize("pair", PAIRS)
def test_correlations(pair: str, z: torch.Tensor) -> None:
    x, y = PAIRS[pair](z)
    found = {(i, j): correlation(x**i, y**j) for i, j in POWERS}
    # The correlation of n independent pairs has variance 1 / n, whatever their distributions.
    assert_within({f"z^{i}, z^{j}": (r, 0.0, 1 / math.sqrt(len(x))) for (i, j), r in found.items()})


def test_seeds_and_ids_are_all_uncorrelated() -> None:
    n = 1 << 14
    keys = [(s, i) for s in (0, 1, 2, 3, 2**32, 2**63, 2**64 - 1) for i in (0, 1, 2, 3, 2**16, 2**31, 2**32 - 1)]
    r = torch.corrcoef(torch.stack([zo.noise(n, seed=s, param_id=i) for s, i in keys]))
    others = r[~torch.eye(len(keys), dtype=torch.bool)]
    assert others.abs().max() < SIGMAS / math.sqrt(n)


def test_seeds_of_directions_are_all_different() -> None:
    slots = [0, 1, 2, 7, 2**17, 2**18, 2**20 - 1]
    seeds = {direction_seed(run, step, slot) for run in (0, 1, 2**64 - 1) for step in range(2000) for slot in slots}
    assert len(seeds) == 3 * 2000 * len(slots)
    assert all(0 <= s < 2**64 for s in seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy and range.


def box_muller64(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """docs/noise.md in float64 with the maths library: section 2's uniforms, then Box-Muller as in any textbook."""
    u = ((a & 0x7FFFFFFF) | 1).float().double() * 2.0**-31
    t = (b & 0x7FFFFF).double() * 2.0**-23 - 0.5 + (b >> 31).double()
    r = torch.sqrt(-2 * torch.log(u))
    return r * torch.cos(math.pi * t), r * torch.sin(math.pi * t)


def test_noise_is_box_muller_of_its_words() -> None:
    index = torch.arange(1 << 18) + 2**40
    even, odd = box_muller64(*words(index, SEED, ID))
    expected = torch.where(index % 2 == 0, even, odd)
    got = zo.noise(len(index), seed=SEED, param_id=ID, offset=2**40)
    assert (got - expected).abs().max() < NOISE_ERROR


def edge_words() -> torch.Tensor:
    """Radius words around every place where the logarithm's argument reduction, or the rounding of u, changes."""
    splits = [2.0**k * f for k in range(32) for f in (1.0, math.sqrt(0.5), 0.75)]
    centres = torch.tensor([min(int(s), 2**31 - 1) for s in splits])
    return (centres[:, None] + torch.arange(-64, 65)).clamp(0, 2**31 - 1).unique()


@pytest.mark.parametrize(
    "radius_words, angle_words",
    [
        pytest.param(edge_words(), torch.tensor([0, 1 << 22, 0x7FFFFF, 0xFFFFFFFF]), id="every kind of radius"),
        pytest.param(torch.tensor([0, 2**31 - 1]), torch.arange(0, 1 << 23, 61), id="every angle at both ends"),
    ],
)
def test_box_muller_is_accurate_and_bounded(radius_words: torch.Tensor, angle_words: torch.Tensor) -> None:
    a, b = (x.flatten() for x in torch.meshgrid(radius_words, angle_words, indexing="ij"))
    for got, expected in zip(box_muller(a, b), box_muller64(a, b), strict=True):
        assert torch.isfinite(got).all()
        assert got.abs().max() <= NOISE_MAXIMUM
        assert (got - expected).abs().max() < NOISE_ERROR


def assert_radius_range(first: int, last: int) -> None:
    low, high = _native.radius_range(first, last)  # (nan, nan) if the argument of any square root were negative
    assert 0 <= low <= high <= NOISE_MAXIMUM


def test_radius_is_real_at_the_edges() -> None:
    assert_radius_range(0, 2**20)
    for k in range(20, 32):
        for centre in (2**k - 1, int(2**k * math.sqrt(0.5))):
            assert_radius_range(max(centre - 2**14, 0), min(centre + 2**14, 2**31 - 1))
    # Bit 31 is not part of the radius.
    assert _native.radius_range(0, 4096) == _native.radius_range(2**31, 2**31 + 4096)


# ---------------------------------------------------------------------------------------------------------------------
# The random bits of stochastic rounding, and what it does to small updates.


def test_rounding_bits_are_uniform_and_independent() -> None:
    index = torch.arange(1 << 18)
    rho = rounding_bits(index, SEED, ID)
    z = zo.noise(len(index), seed=SEED, param_id=ID)
    even, odd = rho[0::2], rho[1::2]
    for sample in (rho, even, odd):
        assert_uniform(torch.bincount(sample >> 8, minlength=256))
        assert_uniform(torch.bincount(sample & 255, minlength=256))
        assert_uniform(torch.bincount(((sample >> 12) << 4) | (sample & 15), minlength=256))  # first and last four
    assert_uniform(torch.bincount((even >> 12) << 4 | (odd >> 12), minlength=256))
    assert_uniform(torch.bincount((even & 15) << 4 | (odd & 15), minlength=256))
    signed = torch.bincount((rho >> 11) * 8 + (torch.special.ndtr(z.double()) * 8).long().clamp(max=7), minlength=256)
    assert_uniform(signed)
    pairs = {
        "rho, z": (rho, z),
        "rho, |z|": (rho, z.abs()),
        "rho, z of the other member": (rho, z.view(-1, 2).flip(1).flatten()),
        "even, odd": (even, odd),
        "next counter": (rho[:-4], rho[4:]),
        "low byte, z": (rho & 255, z),
    }
    assert_within({name: (correlation(x, y), 0.0, 1 / math.sqrt(len(x))) for name, (x, y) in pairs.items()})


BF16, FP16 = torch.bfloat16, torch.float16
PLACES = {  # dtype, weight, ulp there
    "bf16": (BF16, 1.5, 2.0**-7),
    "bf16 between binades": (BF16, 1.0, 2.0**-7),
    "fp16": (FP16, 1.5, 2.0**-10),
    "fp16 subnormal": (FP16, 300 * 2.0**-24, 2.0**-24),
    "fp16 between normal and subnormal": (FP16, 2.0**-14, 2.0**-24),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "size, distribution", [(1e-3, "normal"), (0.1, "normal"), (3.0, "normal"), (0.1, "rademacher")]
)
def test_stochastic_rounding_is_unbiased(place: str, size: float, distribution: str) -> None:
    """Many updates of `size` ulp: the mean is kept, along the sign of the weight too, and so is the size of the sum."""
    dtype, weight, ulp = PLACES[place]
    n, seeds = 1 << 19, list(range(48))
    start = torch.full((n,), weight)
    start[torch.arange(n) // 4 % 2 == 1] *= -1  # both signs for each output of Philox
    w, exact = start.to(dtype), torch.zeros(n)
    assert torch.equal(w.float(), start)
    for seed in seeds:
        zo.add_noise_([w], seed, size * ulp, param_ids=[ID], rounding="stochastic", distribution=distribution)
    # In ulp; float32 is exact enough by far.
    zo.add_noise_([exact], seeds, [size] * len(seeds), param_ids=[ID], distribution=distribution)
    got = (w.float() - start) / ulp

    # Rounding of x ulp has variance f(1 - f) with f the fraction of x: at most |x| and at most 1/4. "bf16 between
    # binades" has half the ulp below, which only makes it smaller.
    variance = len(seeds) * min(size * (math.sqrt(2 / math.pi) if distribution == "normal" else 1.0), 0.25)
    error = math.sqrt(variance / n)
    slope_error = math.sqrt(variance / (len(seeds) * size**2) / n)
    away = got - exact
    assert_within(
        {
            "mean": (away.mean().item(), 0.0, error),
            "mean along the weight": ((away * start.sign()).mean().item(), 0.0, error),
            "share kept": (((got * exact).sum() / (exact * exact).sum()).item(), 1.0, slope_error),
        }
    )


SIGN_STREAMS = {
    "one direction": lambda n: signs(n),
    "all zero": lambda n: signs(n, seed=0, param_id=0),
    "all ones, far out": lambda n: signs(n, seed=2**64 - 1, param_id=2**32 - 1, offset=2**63 - 1 - n),
    "first of many tensors": lambda n: torch.cat([signs(128, param_id=i) for i in range(n // 128)]),
    "first of many steps": lambda n: torch.cat([signs(128, seed=direction_seed(0, i, 0)) for i in range(n // 128)]),
}


def signs(n: int, seed: int = SEED, param_id: int = ID, offset: int = 0) -> torch.Tensor:
    return zo.noise(n, seed=seed, param_id=param_id, offset=offset, distribution="rademacher")


@pytest.mark.parametrize("stream", SIGN_STREAMS)
def test_signs_are_fair_alone_in_pairs_and_in_patterns(stream: str) -> None:
    n = N if stream == "one direction" else N // 4
    z = SIGN_STREAMS[stream](n)
    assert torch.equal(z.abs(), torch.ones(n))
    assert_within({"mean": (z.mean().item(), 0.0, 1 / math.sqrt(n))})
    # Of the 128 signs of a counter, each and every product of two has mean 0 and variance 1.
    block = z.view(-1, 128)
    assert block.mean(0).abs().max() < SIGMAS / math.sqrt(len(block))
    twos = (block.T @ block / len(block))[torch.ones(128, 128).triu(1) > 0]
    assert twos.abs().max() < SIGMAS / math.sqrt(len(block))
    # Patterns of eight neighbours, and of a sign in each of the four words.
    assert_uniform(torch.bincount((z.view(-1, 8) < 0).long() @ 2 ** torch.arange(8), minlength=256))
    assert_uniform(torch.bincount((block[:, 3::32] < 0).long() @ 2 ** torch.arange(4), minlength=16))


SIGN_PAIRS = {
    **{f"lag {lag}": lagged(lag) for lag in (1, 2, 16, 31, 32, 33, 64, 127, 128, 129, 4096)},
    "seed + 1": lambda z: (z, signs(N, seed=SEED + 1)),
    "seed + 2**32": lambda z: (z, signs(N, seed=SEED + 2**32)),
    "param id + 1": lambda z: (z, signs(N, param_id=ID + 1)),
    "seed and param id exchanged": lambda z: (z, signs(N, seed=ID, param_id=SEED)),
    "index + 2**39": lambda z: (z, signs(N, offset=2**39)),  # the same low counter word
    "normals of the same seed": lambda z: (z, zo.noise(N, seed=SEED, param_id=ID)),
    "next step": lambda z: (signs(N, seed=direction_seed(SEED, 0, 0)), signs(N, seed=direction_seed(SEED, 1, 0))),
}


def test_signs_are_uncorrelated() -> None:
    z = signs(N)
    pairs = {name: of(z) for name, of in SIGN_PAIRS.items()}
    assert_within({name: (correlation(x, y), 0.0, 1 / math.sqrt(len(x))) for name, (x, y) in pairs.items()})


def test_roundings_under_signs_are_uniform_and_independent_of_them() -> None:
    index = torch.arange(1 << 18)
    rho = rounding_bits(index, SEED, ID, "rademacher")
    negative = (signs(len(index)) < 0).long()
    for sample in (rho, rho[0::2], rho[1::2]):
        assert_uniform(torch.bincount(sample >> 8, minlength=256))
        assert_uniform(torch.bincount(sample & 255, minlength=256))
    assert_uniform(torch.bincount((rho[0::2] >> 12) << 4 | (rho[1::2] >> 12), minlength=256))
    assert_uniform(torch.bincount((rho >> 12) << 1 | negative, minlength=32))
    assert_uniform(torch.bincount((rho & 15) << 1 | negative, minlength=32))
    # Sixteen bits and the signs of the element, of its neighbour, and 128 on: all products have mean 0, variance 1.
    bits = 1.0 - 2.0 * (rho[:, None] >> torch.arange(16) & 1).float()
    for shift in (0, 1, 128):
        products = (1.0 - 2.0 * negative.roll(shift)) @ bits / len(index)
        assert products.abs().max() < SIGMAS / math.sqrt(len(index))


# ---------------------------------------------------------------------------------------------------------------------
# Opt-in: minutes.

CHUNK = 1 << 24


@pytest.mark.slow
def test_moments_and_distribution_of_many() -> None:
    n, cells = 1 << 28, 1 << 14
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(cells, dtype=torch.int64)
    for offset in range(0, n, CHUNK):
        z = zo.noise(CHUNK, seed=SEED, param_id=ID, offset=offset)
        sums += power_sums(z)
        counts += torch.bincount((torch.special.ndtr(z.double()) * cells).long(), minlength=cells)
    assert_within(moments(n, sums.tolist()))
    assert_uniform(counts)
    # The supremum over the cells' edges alone: no larger than Kolmogorov's, so his bound holds.
    edges = torch.arange(1, cells + 1, dtype=torch.float64) / cells
    assert math.sqrt(n) * (counts.cumsum(0) / n - edges).abs().max() < KOLMOGOROV


@pytest.mark.slow
def test_tails_of_many() -> None:
    n, sigmas = 1 << 31, (5.0, 5.5, 6.0, 6.25)
    counts = dict.fromkeys(sigmas, 0)
    for offset in range(0, n, CHUNK):
        z = zo.noise(CHUNK, seed=SEED, param_id=ID, offset=offset)
        for sigma in sigmas:
            counts[sigma] += int((z.abs_() > sigma).sum())
    for sigma, count in counts.items():
        assert_poisson(count, n * beyond(sigma))


@pytest.mark.slow
def test_correlations_of_many() -> None:
    n = 1 << 27
    sums = {(lag, power): 0.0 for lag in (1, 2, 3, 4, 4096) for power in (1, 2)}
    for offset in range(0, n, CHUNK):
        z = zo.noise(CHUNK + 4096, seed=SEED, param_id=ID, offset=offset).double()
        for lag, power in sums:
            v = z if power == 1 else (z * z - 1) / math.sqrt(2)
            sums[lag, power] += (v[:CHUNK] * v[lag : CHUNK + lag]).sum().item()
    assert_within({f"lag {lag}, power {power}": (s / n, 0.0, 1 / math.sqrt(n)) for (lag, power), s in sums.items()})


@pytest.mark.slow
def test_radius_is_real_for_every_word() -> None:
    assert_radius_range(0, 2**31 - 1)
