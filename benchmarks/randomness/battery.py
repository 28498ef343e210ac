"""`battery`: dieharder's tests of the words of noise v1, and of normals that were made uniform again."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ..bench.registry import Case, Row, Target, judge
from . import dieharder, sample, uniforms, words
from .sources import SOURCES, Source
from .verdict import verdict

_Words = Iterator[NDArray[np.uint32]]
_ENDLESS = 2**62
_NOT_FAILED = Target("p_value", at_least=1e-6, at_most=1 - 1e-6)  # dieharder's own bounds

# By dieharder's number, with the size of the tuples where a test has several. Those left out take minutes each (gcd,
# minimum distances, all lags of the lagged sums), or their author marks them as suspect (OPSO, OQSO, DNA, sums).
QUICK: dict[str, tuple[str, ...]] = {
    "diehard_birthdays": ("-d", "0"),
    "diehard_operm5": ("-d", "1"),
    "diehard_rank_32x32": ("-d", "2"),
    "diehard_rank_6x8": ("-d", "3"),
    "diehard_bitstream": ("-d", "4"),
    "diehard_count_1s_str": ("-d", "8"),
    "diehard_count_1s_byt": ("-d", "9"),
    "diehard_parking_lot": ("-d", "10"),
    "diehard_2dsphere": ("-d", "11"),
    "diehard_3dsphere": ("-d", "12"),
    "diehard_runs": ("-d", "15"),
    "diehard_craps": ("-d", "16"),
    "sts_monobit": ("-d", "100"),
    "sts_serial": ("-d", "102"),
    "rgb_bitdist": ("-d", "200", "-n", "4"),
    "rgb_permutations": ("-d", "202", "-n", "5"),
    "rgb_lagged_sum": ("-d", "203", "-n", "3"),
    "dab_bytedistrib": ("-d", "205"),
    "dab_dct": ("-d", "206"),
    "dab_filltree": ("-d", "207"),
    "dab_filltree2": ("-d", "208"),
    "dab_monobit2": ("-d", "209"),
}
BATTERIES: dict[str, dict[str, tuple[str, ...]]] = {"quick": QUICK, "all": {"all": ("-a",)}}
_ELSEWHERE = {
    name: f"{name} is neither in Debian nor on PyPI; dieharder is what they have"
    for name in ("TestU01", "PractRand")
}  # fmt: skip


@dataclass
class Stream:
    """Words that go on from one test to the next, and what the tests made of them."""

    begin: Callable[[], _Words]
    outcomes: list[dieharder.Outcome] = field(default_factory=list)
    _words: _Words | None = None

    def words(self) -> _Words:
        if self._words is None:
            self._words = self.begin()
        return self._words


def cases(options: Namespace) -> Iterator[Case]:
    for name, (generator, begin, skipped) in _streams(options).items():
        stream = Stream(begin)
        facts = {"experiment": "battery", "generator": generator, "device": options.device, "stream": name}
        if (reason := skipped or dieharder.unavailable()) is not None:
            yield Case(f"battery/{name}", facts, skipped=reason)
            continue
        for test, arguments in BATTERIES[options.battery].items():
            measure = partial(_measure, stream, arguments, generator, options.threads)
            yield Case(f"battery/{name}/{test}", facts, measure)
        yield Case(f"battery/{name}/p-values", facts, partial(_together, stream))
    for name, reason in _ELSEWHERE.items():
        yield Case(f"battery/{name}", {"experiment": "battery"}, skipped=reason)


def _streams(options: Namespace) -> dict[str, tuple[str, Callable[[], _Words], str | None]]:
    """Each name -> the generator, what begins a stream of words, and why there is none."""
    found: dict[str, tuple[str, Callable[[], _Words], str | None]] = {}
    if "zo.noise" in options.generators:
        found |= {f"words {name}": ("zo.noise", begin, None) for name, begin in words.ORDERS.items()}
    for name in options.generators:
        source = SOURCES[name](options.device)
        reason = source.skipped()
        if name == "tl.randn" and options.device == "cpu":
            reason = "tests read many millions of values, and Triton's interpreter makes about one million a second"
        found[f"{name} to uniform"] = (name, partial(_uniform, source), reason)
    return found


def _uniform(source: Source) -> _Words:
    return uniforms.words(sample.tensors(source, _ENDLESS))


def _measure(stream: Stream, arguments: tuple[str, ...], generator: str, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    if generator == "zo.noise" and (wrong := words.wrong()):
        return [{"correct": False, "wrong": wrong}]
    outcomes, sent = dieharder.run(stream.words(), *arguments)
    stream.outcomes += outcomes
    return [{"correct": True if generator == "zo.noise" else None, "values": sent, **_row(o)} for o in outcomes]


def _row(outcome: dieharder.Outcome) -> Row:
    row = {
        "statistic": outcome.test,
        "tests": outcome.samples,
        "p_value": outcome.p_value,
        "first_p_value": outcome.first_p_value,
        "assessment": outcome.assessment,
    }
    return {**row, **judge(row, [_NOT_FAILED])}


def _together(stream: Stream) -> list[Row]:
    """Whether the first p-values of all tests are themselves uniform, and how many of the last ones are not passed."""
    if not stream.outcomes:
        return [{"skipped": "none of the stream's tests was run"}]
    from scipy.stats import kstest

    first = [outcome.first_p_value for outcome in stream.outcomes]
    count = {word: sum(o.assessment == word for o in stream.outcomes) for word in dieharder.ASSESSMENTS}
    weak_at_first = sum(not 0.005 <= p <= 0.995 for p in first)
    return [
        {
            "statistic": "p-values against a uniform",
            "tests": len(first),
            "p_value": float(kstest(first, "uniform").pvalue),
            "assessment": ", ".join(f"{n} {word.lower()}" for word, n in count.items())
            + f"; {weak_at_first} weak at first",
        }
    ]


def cells(row: Row) -> dict[str, str]:
    return {
        "words": "" if row.get("values") is None else f"{row['values']:.3g}",
        "statistic": row["statistic"],
        "p-values": str(row["tests"]),
        "first p": "" if row.get("first_p_value") is None else f"{row['first_p_value']:.4f}",
        "p": f"{row['p_value']:.4f}",
        "dieharder says": row["assessment"],
        "not by chance": verdict(row),
    }
