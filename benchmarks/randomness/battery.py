"""`battery`: Robert G. Brown's dieharder on words (`words.py`), and on normals that were made uniform again."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..bench.registry import Case, Row, Target, Unavailable, Wrong, judge
from .sources import SOURCES, Source, tensors
from .words import ORDERS

BITS = 16  # of a normal's uniform; float32 holds no more of them without bias (`population` says how many)
ASSESSMENTS = ("PASSED", "WEAK", "FAILED")  # outside of 0.005 to 0.995, outside of 10^-6 to 1 - 10^-6
_NOT_FAILED = Target("p_value", at_least=1e-6, at_most=1 - 1e-6)  # dieharder's own bounds
_LINE = re.compile(
    r"^\s*(?P<name>\w+)\|\s*(?P<ntup>\d+)\|\s*\d+\|\s*(?P<psamples>\d+)\|\s*(?P<p>-?[\d.]+)\|\s*(?P<word>\w+)",
    re.MULTILINE,
)
# By dieharder's number, with the size of the tuples where a test has several. Those left out take minutes each (gcd,
# minimum distances, all lags of the lagged sums), or their author marks them as suspect (OPSO, OQSO, DNA, sums).
# Those named dab take one sample, and a hundred more are too many to take again (-Y 0).
_TESTS = {
    "diehard_birthdays": "-d 0", "diehard_operm5": "-d 1", "diehard_rank_32x32": "-d 2", "diehard_rank_6x8": "-d 3",
    "diehard_bitstream": "-d 4", "diehard_count_1s_str": "-d 8", "diehard_count_1s_byt": "-d 9",
    "diehard_parking_lot": "-d 10", "diehard_2dsphere": "-d 11", "diehard_3dsphere": "-d 12", "diehard_runs": "-d 15",
    "diehard_craps": "-d 16", "sts_monobit": "-d 100", "sts_serial": "-d 102", "rgb_bitdist": "-d 200 -n 4",
    "rgb_permutations": "-d 202 -n 5", "rgb_lagged_sum": "-d 203 -n 3", "dab_bytedistrib": "-d 205 -Y 0",
    "dab_dct": "-d 206 -Y 0", "dab_filltree": "-d 207 -Y 0", "dab_filltree2": "-d 208 -Y 0",
    "dab_monobit2": "-d 209 -Y 0",
}  # fmt: skip


def uniform(normals: Iterator[Tensor]) -> Iterator[Tensor]:
    """Tensors of an even number of normals -> words of two neighbours' BITS highest bits, the first one's on top."""
    for x in normals:
        cells = torch.special.ndtr(x.double()).mul_(2**BITS).long().clamp_(max=2**BITS - 1)
        yield (cells[0::2] << BITS) | cells[1::2]


def cases(options: Namespace) -> Iterator[Case]:
    sources = {name: SOURCES[name]() for name in options.generators}
    streams: list[tuple[str, Source, Iterator[Tensor]]] = []
    for generator, orders in ORDERS.items():
        streams += [(name, sources[generator], make()) for name, make in orders.items() if generator in sources]
    # Each test reads many millions of values, which would take Triton's interpreter hours.
    streams += [
        (f"{name} to uniform", source, uniform(tensors(source, 2**62)))
        for name, source in sources.items()
        if name in ("zo.noise", "torch.randn")
    ]
    missing = None if shutil.which("dieharder") else "dieharder is not installed (Debian: apt-get install dieharder)"
    for name, source, words in streams:
        facts = {"experiment": "battery", "generator": source.generator, "device": "cpu", "stream": name}
        results: list[Row] = []  # of the tests so far
        for test, arguments in _TESTS.items():
            measure = partial(_measure, source, words, results, arguments.split(), options.threads)
            yield Case(f"battery/{name}/{test}", facts, measure, missing)
        yield Case(f"battery/{name}/p-values", facts, partial(_together, results), missing)


def _measure(
    source: Source, words: Iterator[Tensor], results: list[Row], arguments: list[str], threads: int
) -> list[Row]:
    """The words go on from one test to the next."""
    torch.set_num_threads(threads)
    if wrong := source.wrong():
        raise Wrong(wrong)
    found, sent = run(words, *arguments)
    results += found
    known = {"correct": True if source.ours else None, "values": sent}
    return [{**known, **row, **judge(row, [_NOT_FAILED])} for row in found]


def _together(results: list[Row]) -> list[Row]:
    """Whether the first p-values of all tests are themselves uniform, and how many of the last ones are not passed."""
    if not results:
        raise Unavailable("none of the stream's tests was run")
    from scipy.stats import kstest

    first, words = [row["first_p_value"] for row in results], [row["assessment"] for row in results]
    told = ", ".join(f"{words.count(word)} {word.lower()}" for word in ASSESSMENTS)
    weak = sum(not 0.005 <= p <= 0.995 for p in first)
    return [
        {
            "statistic": "p-values against a uniform",
            "tests": len(first),
            "p_value": float(kstest(first, "uniform").pvalue),
            "assessment": f"{told}; {weak} weak at first",
        }
    ]


def run(words: Iterator[Tensor], *options: str) -> tuple[list[Row], int]:
    """Feed dieharder through a pipe until it has enough.

    It tries a weak result again with more samples until it is weak no longer (-Y 1, unless the options say otherwise).
    The last one is kept, with the number of samples that it took.

    Args:
        words: as many as it wants; what it does not read of the last tensor is lost.
        options: which test, as dieharder spells it.

    Returns:
        The results in order, and how many words were offered, the last tensor in full.

    Raises:
        RuntimeError: it failed, or its answer has no result.
    """
    command = ["dieharder", "-g", "200", "-k", "2", "-Y", "1", *options]
    sent = 0
    with tempfile.TemporaryFile() as answer:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=answer, stderr=subprocess.STDOUT)
        assert child.stdin is not None
        try:
            for block in words:
                sent += len(block)
                child.stdin.write(block.numpy().astype(np.uint32).tobytes())
        except BrokenPipeError:  # it has enough
            pass
        except BaseException:
            child.kill()
            raise
        finally:
            with suppress(BrokenPipeError):
                child.stdin.close()
            status = child.wait()
        answer.seek(0)
        text = answer.read().decode()
    results = parse(text)
    if status or not results or "nan" in text:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}: {text.strip()[-300:]}")
    return results, sent


def parse(text: str) -> list[Row]:
    """The results in dieharder's answer: `tests` p-values that a Kolmogorov-Smirnov test put together.

    Of a result that was tried again with more samples the last p-value is kept, and the first one beside it.
    """
    found: dict[str, Row] = {}
    seen: dict[tuple[str, int], int] = {}
    for line in _LINE.finditer(text):
        name, samples, p = f"{line['name']}/{line['ntup']}", int(line["psamples"]), abs(float(line["p"]))  # 0 may be -0
        number = seen[name, samples] = seen.get((name, samples), 0) + 1
        if number > 1:
            name = f"{name}#{number}"
        first = found[name]["first_p_value"] if name in found else p
        found[name] = {
            "statistic": name, "tests": samples, "p_value": p, "first_p_value": first, "assessment": line["word"],
        }  # fmt: skip
    return list(found.values())
