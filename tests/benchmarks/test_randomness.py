"""The statistics of the noise: they pass noise v1 and flag generators that are broken on purpose."""

import csv
import math
import shutil
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.randomness import battery, cases, figure, sources, values, words
from zo_kernels import spec

pytest.importorskip("scipy.stats")

from benchmarks.randomness import correlations, moments, population, signs

N = 2**22


class Changed(sources.Ours):
    """Noise v1 with something done to its values."""

    def __init__(self, change):
        self.change = change

    def tensor(self, step, number, count):
        return self.change(super().tensor, step, number, count)


class ChangedSigns(Changed, sources.Signs):
    """Its signs, likewise."""


def missed(rows):
    return {row["statistic"] for row in rows if not row["target_met"]}


def judged_moments(source, values=N):
    return cases.judged(moments.statistics(source, values))


def judged_correlations(groups, values, count):
    return cases.judged(correlations.of_groups(groups, values, count))


def test_moments_pass_noise_and_torch():
    for source in (sources.Ours(), sources.Torch()):
        rows = judged_moments(source)
        assert missed(rows) == set()
        assert sum(row["z"] is not None for row in rows if "z" in row) == 18


def test_moments_are_those_of_the_values(monkeypatch):
    monkeypatch.setattr(sources, "PER_TENSOR", 30_000)
    x = torch.cat(list(sources.tensors(sources.Ours(), 100_000)))
    sample = moments.Sample()
    sample.add(x[:70_000])
    sample.add(x[70_000:])
    for k, total in zip(moments.NAMES, sample.sums, strict=True):
        assert total.item() == pytest.approx((x.double() ** k).sum().item(), rel=1e-12)
    assert sample.values == len(x) and sample.largest == x.abs().max()
    edges = torch.linspace(-8, 8, 2049, dtype=torch.float64)
    assert torch.equal(sample.counts, torch.histogram(x.double(), edges).hist.long())
    rows = moments.statistics(sources.Ours(), 100_000)
    tail = next(row for row in rows if row["statistic"] == "|z| > 2.5")
    assert tail["measured"] == (x.abs() > 2.5).sum().item()


@pytest.mark.parametrize(
    ("change", "values", "expected"),
    [
        (lambda draw, step, number, count: draw(0, 0, count), N, {"chi-square, 970 cells"}),
        (lambda draw, *a: draw(*a) + 0.001, 2**25, {"mean"}),
        (lambda draw, *a: draw(*a) * 1.002, 2**24, {"variance - 1"}),
        (lambda draw, *a: draw(*a).clamp(-4, 4), N, {"|z| > 4.5", "largest |z|"}),
        (lambda draw, *a: (draw(*a) * 64).round() / 64, N, {"chi-square, 970 cells"}),
    ],
    ids=["one tensor again and again", "shifted", "wider", "without tails", "coarse"],
)
def test_moments_flag(change, values, expected):
    assert expected <= missed(judged_moments(Changed(change), values))


def test_correlations_pass_noise():
    count = 2**12
    for source, kinds in ((sources.Ours(), ("values", "squares", "signs")), (sources.Signs(), ("signs",))):
        every = {**correlations.of_source(source, count), **correlations.of_noise(source, count)}
        rows = cases.judged(correlations.of_groups(every, 2**18, count, kinds))
        assert missed(rows) == set()
        assert sum(row["tests"] for row in rows) == len(kinds) * sum(map(len, every.values()))
        assert {row["statistic"].rpartition(",")[0] for row in rows} == set(every)


def sign_of_the_pair(draw, *which):
    x = draw(*which)
    x[1::2] = x[1::2].abs() * x[0::2].sign()
    return x


def moving_average(draw, *which):
    x = draw(*which)
    return (x - 0.02 * x.roll(3)) / math.sqrt(1 + 0.02**2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda draw, step, number, count: draw(step // 2, number, count), {"next step, values", "next step, squares"}),
        (lambda draw, step, *a: draw(step // 2, *a) * (-1) ** step, {"next step, signs"}),
        (moving_average, {"lags, values"}),
        (sign_of_the_pair, {"members of a Box-Muller pair, signs", "lags, values"}),
    ],
    ids=["every seed twice", "antithetic", "moving average", "signs of the neighbour"],
)
def test_correlations_flag(change, expected):
    rows = judged_correlations(correlations.of_source(Changed(change), 2**16), 2**20, 2**16)
    assert expected <= missed(rows)


def test_correlations_flag_seeds_that_lose_a_bit(monkeypatch):
    noise = sources.zo.noise
    monkeypatch.setattr(sources.zo, "noise", lambda n, *, seed, **known: noise(n, seed=seed & ~(1 << 33), **known))
    rows = judged_correlations(correlations.of_noise(sources.Ours(), 2**10), 2**16, 2**10)
    assert missed(rows) == {f"one bit of the seed, {kind}" for kind in ("values", "squares", "signs")}
    assert {row["at"] for row in rows if not row["target_met"]} == {"bit 33"}


def test_signs_pass_and_so_do_their_roundings():
    rows = cases.judged(signs.statistics(sources.Signs(), 2**20))
    assert missed(rows) == set() and all(0 <= row["p_value"] <= 1 for row in rows)
    tests = {row["statistic"].rpartition(",")[0]: row["tests"] for row in rows}
    assert tests["products of two of a counter"] == math.comb(128, 2)
    assert tests["products of three of a word"] == math.comb(32, 3)
    assert tests["products of four of a word"] == math.comb(32, 4)


def product_of_others(places):
    """A sign of a word is the product of others a little more often than not."""

    def change(draw, *which):
        z = draw(*which).view(-1, 32)
        z[::8, 30] = z[::8, places].prod(1)
        return z.flatten()

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda draw, *which: draw(*which).view(-1, 128).index_fill(1, torch.tensor(77), 1.0).flatten(),
            {"each sign of a counter, largest"},
        ),
        (product_of_others([5]), {"products of two of a counter, largest"}),
        (product_of_others([2, 7]), {"products of three of a word, largest"}),
        (product_of_others([2, 7, 11]), {"products of four of a word, largest"}),
        (lambda draw, step, number, count: draw(0, 0, count), {"products of two of a counter, sum of squares"}),
        (lambda draw, *which: draw(*which).view(-1, 2, 64).abs().flatten(), {"mean, largest"}),
    ],
    ids=["one place", "two places", "three of a word", "four of a word", "one tensor again and again", "all +1"],
)
def test_signs_flag(change, expected):
    assert expected <= missed(cases.judged(signs.statistics(ChangedSigns(change), 2**20)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rho, z: rho ^ (z < 0).long() << 15, {"a rounding but for its lowest bit, and the sign"}),
        (lambda rho, z: rho & 0xFF00, {"roundings"}),
        (
            lambda rho, z: rho.view(-1, 2)[:, :1].expand(-1, 2).flatten(),
            {"roundings of two neighbours, the high byte of each"},
        ),
    ],
    ids=["the sign again", "eight bits", "one for two"],
)
def test_roundings_flag(monkeypatch, change, expected):
    """The first change makes the highest bit depend on the sign where the others are 0 alone."""
    made = signs.rounding_bits

    def changed(seed, param_id):
        rho = made(seed, param_id)
        z = sources.Signs().drawn(len(rho), seed, param_id)
        where = (rho & 7) == 0
        return torch.where(where, change(rho & 0x7FFF, z), rho)

    monkeypatch.setattr(signs, "rounding_bits", changed)
    assert expected <= missed(cases.judged(signs.roundings(sources.Signs(), 2**23)))


def test_words_of_signs_are_those_of_the_noise():
    orders = {name: next(make()) for name, make in words.ORDERS["zo.noise signs"].items()}
    places = torch.arange(512)
    for name in (0, 1, 5):
        for what, key in (("seed", (name, 0)), ("id", (0, name))):
            bits = orders[f"sign words by {what}"][4 * name : 4 * name + 4, None] >> torch.arange(32) & 1
            even, odd = bits[:, :16], bits[:, 16:]
            z = 1 - 2 * torch.stack([even, odd], dim=2).flatten()
            assert torch.equal(z.float(), spec.rademacher(places[:128], *key))
            rho = orders[f"rounding words by {what}"][4 * name : 4 * name + 4, None] >> torch.tensor([0, 16]) & 0xFFFF
            assert torch.equal(rho.flatten(), spec.rounding_bits(places[:8], *key, "rademacher"))
    in_order = orders["signs by element"][:16, None] >> torch.arange(32) & 1
    assert torch.equal(1.0 - 2 * in_order.flatten(), spec.rademacher(places, 0, 0))
    turns = orders["streams in turn"].view(-1, 4, 3)
    assert torch.equal(turns[:, :, 1].flatten()[:4096], orders["sign words by counter"][:4096])
    assert torch.equal(turns[:, :, 2].flatten()[:4096], orders["rounding words by counter"][:4096])
    assert torch.equal(signs.rounding_bits(9, 7)[:512], spec.rounding_bits(places, 9, 7, "rademacher"))


def test_products_have_mean_zero_and_variance_one():
    x, y = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    assert correlations.products(x, y).tolist() == [2.0, (0 * 8 + 3 * -0.75) / 2, 0.0]
    x, y = sources.Ours().tensor(0, 0, 2**16).double().view(2, -1)
    each = torch.stack([correlations.products(a, b) for a, b in zip(x.view(-1, 8), y.view(-1, 8), strict=True)])
    assert torch.allclose(each.square().mean(0) / 8, torch.ones(3, dtype=torch.float64), rtol=0.15)


def test_words_are_those_of_the_noise():
    """Normals made of the words are the library's."""
    of_seeds = next(words.interleaved()).view(16, 4, 16, 64)
    first = [(spec.direction_seed(0, 0, 0), sources.ids()[0], next(words.in_order()))]
    for seed, param_id, of in [*first, *((s, i, of_seeds[:, :, i, s].flatten()) for s, i in ((0, 0), (63, 1)))]:
        made = torch.stack(spec.box_muller(*of.view(-1, 2).T), dim=1).flatten()
        assert torch.equal(made, sources.zo.noise(len(of), seed=seed, param_id=param_id))


def test_orders_go_on_with_new_words():
    for order in (words.in_order, words.interleaved):
        stream = order()
        blocks = torch.cat([next(stream) for _ in range(3)])
        assert blocks.min() >= 0 and blocks.max() < 2**32
        assert len(blocks.view(-1, 2).unique(dim=0)) == len(blocks) // 2


def test_uniform_bits():
    x = torch.tensor([0.0, -9.0, 9.0, 1.0])
    one = int(2**16 * 0.5 * math.erfc(-1 / math.sqrt(2)))
    assert next(battery.uniform(iter([x]))).tolist() == [0x80000000, (0xFFFF << 16) | one]
    made = next(battery.uniform(sources.tensors(sources.Ours(), 2**17)))
    counts = torch.bincount(torch.cat([made >> 24, made >> 8 & 255]), minlength=256)
    assert ((counts - 512) ** 2 / 512).sum() < 255 + 4 * math.sqrt(2 * 255)


def test_sixteen_bits_are_what_float32_gives():
    assert population.noticed(16) > 1e9 > population.noticed(18)
    assert population.noticed(8) > population.noticed(12) > population.noticed(16)


ANSWER = """
        test_name   |ntup| tsamples |psamples|  p-value |Assessment
          sts_serial|   1|    100000|     100|0.63272733|  PASSED
          sts_serial|   3|    100000|     100|0.55778150|  PASSED
          sts_serial|   3|    100000|     100|0.00066941|   WEAK
          sts_serial|   1|    100000|     200|0.33515750|  PASSED
          sts_serial|   3|    100000|     200|0.01427677|  PASSED
          sts_serial|   3|    100000|     200|0.00000000|  FAILED
"""


def test_answers_are_read():
    keys = ("statistic", "tests", "p_value", "first_p_value", "assessment")
    found = [tuple(row[key] for key in keys) for row in battery.parse(ANSWER)]
    assert found == [
        ("sts_serial/1", 200, 0.3351575, 0.63272733, "PASSED"),
        ("sts_serial/3", 200, 0.01427677, 0.5577815, "PASSED"),
        ("sts_serial/3#2", 200, 0.0, 0.00066941, "FAILED"),
    ]


@pytest.fixture
def imitation(tmp_path, monkeypatch):
    """Something called dieharder that reads a few words, answers as it is told and ends with a status."""

    def make(answer, status=0):
        script = tmp_path / "dieharder"
        (tmp_path / "answer").write_text(answer)
        script.write_text(f"#!/bin/sh\nhead -c 40000 > {tmp_path}/read\ncat {tmp_path}/answer\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        return tmp_path / "read"

    return make


def test_words_reach_the_battery(imitation):
    read = imitation(ANSWER)
    outcomes, sent = battery.run(words.interleaved(), "-d", "102")
    assert len(outcomes) == 3
    assert sent >= 10_000
    assert np.array_equal(np.fromfile(read, dtype=np.uint32), next(words.interleaved())[:10_000])


def test_a_battery_that_fails_is_not_passed_over(imitation):
    imitation("no such test\n", 3)
    with pytest.raises(RuntimeError, match=r"status 3: no such test"):
        battery.run(words.in_order(), "-d", "999")
    imitation("")
    with pytest.raises(RuntimeError, match="status 0"):
        battery.run(words.in_order(), "-d", "0")


@pytest.mark.skipif(shutil.which("dieharder") is None, reason="dieharder is not installed")
def test_dieharder_fails_words_that_count():
    counting = (torch.arange(first, first + 2**14) for first in range(0, 2**40, 2**14))
    outcomes, _ = battery.run(counting, "-d", "100", "-p", "20")
    assert [row["assessment"] for row in outcomes] == ["FAILED"]


def test_radii_are_all_counted(monkeypatch):
    monkeypatch.setattr(population, "_BLOCK", 2**10)
    for power in (24, 25, 31):  # words are rounded from 2**24 on
        words = torch.arange(2**power - 2**14 + 1, min(2**power + 2**14, 2**31), 2)
        radii, counts = map(torch.cat, zip(*population.radii(int(words[-1]) + 1, int(words[0])), strict=True))
        assert torch.equal(radii.repeat_interleave(counts.long()), spec.radius(words).double())
        assert len(radii) < len(words)


def test_population_tail_is_the_normals():
    cos = torch.cos(math.pi * (torch.arange(2**12) / 2**12 - 0.5)).double()
    radii = population.largest_radii(4.0)
    assert radii[-1].item() == sources.Ours.largest
    expected = (torch.searchsorted(radii, 4.0 / cos.abs()) - len(radii)).abs().sum().item() / (2**30 * len(cos))
    assert expected == pytest.approx(moments.beyond(4.0), rel=1e-3)


def test_tl_randn_is_tritons():
    pytest.importorskip("triton")
    found = sources.Triton().tensor(7, 1, 1000)
    counter = torch.arange(1000, 2000)
    zero = torch.zeros_like(counter)
    x0, x1, *_ = spec.philox4x32((counter, zero, zero, zero), (7, 0), rounds=10)
    u, v = (torch.where(x >= 2**31, 2**32 - 1 - x, x).double() * 4.6566127342e-10 for x in (x0, x1))
    expected = (-2 * u.clamp(min=1e-7).log()).sqrt() * (2 * math.pi * v).cos()
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_torch_is_drawn_as_the_published_code_does():
    source = sources.Torch()
    drawn = torch.cat([source.tensor(3, number, 64) for number in range(2)])
    torch_generator = torch.Generator().manual_seed(3)
    assert torch.equal(drawn, torch.cat([torch.randn(64, generator=torch_generator) for _ in range(2)]))
    with pytest.raises(ValueError, match="in order, got tensor 5"):
        source.tensor(3, 5, 64)


def test_counts_of_values():
    assert [values(text) for text in ("1e10", "64M", "4096")] == [10**10, 2**26, 4096]
    for text in ("0", "1.5", "nan", "-3", "many"):
        with pytest.raises((ValueError, ArgumentTypeError)):
            values(text)


def test_the_suite_writes_its_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    only = "(moments|correlations|signs)/(zo|torch)"
    assert main(["randomness", "--values", "256K", "--only", only, "--json", str(file)]) == 0
    with file.with_suffix(".csv").open() as opened:
        rows = list(csv.DictReader(opened))
    run = [row for row in rows if not row["skipped"]]
    ours = {"signs/zo.noise signs", "correlations/zo.noise signs"}
    assert {row["case"] for row in run} == ours | {
        f"{experiment}/{name}" for experiment in ("moments", "correlations") for name in ("zo.noise", "torch.randn")
    }
    assert all(row["correct"] == ("" if row["generator"] == "torch.randn" else "True") for row in run)
    assert all(0 <= float(row["p_value"]) <= 1 for row in run)
    assert "Kolmogorov" in capsys.readouterr().out


def test_other_bits_than_noise_v1_are_wrong(monkeypatch, capsys):
    noise = sources.zo.noise
    monkeypatch.setattr(sources.zo, "noise", lambda n, *, seed, **known: noise(n, seed=seed ^ 1, **known))
    for case in ("moments/zo", "signs/zo"):
        assert main(["randomness", "--values", "256K", "--only", case]) == 1
        assert "not those of noise v1" in capsys.readouterr().out


def test_a_tensor_is_more_than_is_checked():
    assert sources.PER_TENSOR > 2 * sources._CHECKED


def test_tails_are_drawn():
    rows = [
        {"experiment": "moments", "generator": "zo.noise", "device": "cpu", "values": N, **row}
        for row in judged_moments(sources.Ours())
    ]
    chosen = figure.choose(
        [*rows, {"experiment": "battery", "statistic": None}, {"experiment": "moments", "wrong": "x"}]
    )
    # Of N values 28 are expected beyond 4.5 and 2.4 beyond 5: too few to draw.
    assert [row["sigma"] for row in chosen] == [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5]
    drawing = pytest.importorskip("matplotlib.figure").Figure()
    figure.draw(drawing, chosen)
    assert len(drawing.axes[0].containers) == 1
