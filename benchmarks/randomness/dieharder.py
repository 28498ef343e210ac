"""Robert G. Brown's dieharder, fed with words through a pipe, and what it answers."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ASSESSMENTS = ("PASSED", "WEAK", "FAILED")  # outside of 0.005 to 0.995, outside of 10^-6 to 1 - 10^-6
_LINE = re.compile(
    r"^\s*(?P<name>\w+)\|\s*(?P<ntup>\d+)\|\s*(?P<tsamples>\d+)\|\s*(?P<psamples>\d+)\|\s*(?P<p>-?[\d.]+)\|\s*(?P<word>\w+)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Outcome:
    """One result of a test.

    Args:
        test: name and tuple size, numbered if the test gives several.
        trials: that each p-value was computed from.
        samples: p-values that a Kolmogorov-Smirnov test put together, in the end.
        p_value: of that test.
        assessment: one of ASSESSMENTS.
        first_p_value: before more samples were taken because a result of the test was weak.
    """

    test: str
    trials: int
    samples: int
    p_value: float
    assessment: str
    first_p_value: float


def unavailable() -> str | None:
    return None if shutil.which("dieharder") else "dieharder is not installed (Debian: apt-get install dieharder)"


def run(words: Iterator[NDArray[np.uint32]], *options: str) -> tuple[list[Outcome], int]:
    """Run it on words until it has enough.

    A weak result is tried again with more samples until it is none (dieharder's -Y 1); the last one is kept, with the
    number of samples that it took.

    Args:
        words: as many as it wants; those that it did not read of the last array are lost.
        options: which test, as dieharder spells it.

    Returns:
        The outcomes in order, and how many words were offered, the last array in full.

    Raises:
        RuntimeError: it failed, or its answer has no result.
    """
    command = ["dieharder", "-g", "200", "-k", "2", "-Y", "1", *options]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdin is not None and child.stdout is not None
    answer: list[bytes] = []
    reader = threading.Thread(target=lambda out: answer.append(out.read()), args=(child.stdout,))
    reader.start()
    sent = 0
    try:
        for block in words:
            sent += len(block)
            child.stdin.write(block.tobytes())
    except BrokenPipeError:  # it has enough
        pass
    except BaseException:
        child.kill()
        raise
    finally:
        with suppress(BrokenPipeError):
            child.stdin.close()
        status = child.wait()
        reader.join()
        child.stdout.close()
    text = b"".join(answer).decode()
    outcomes = parse(text)
    if status or not outcomes or "nan" in text:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}: {text.strip()[-300:]}")
    return outcomes, sent


def parse(text: str) -> list[Outcome]:
    """The outcomes in dieharder's answer; of those that were tried again with more samples, the last."""
    found: dict[str, Outcome] = {}
    seen: dict[tuple[str, int], int] = {}
    for line in _LINE.finditer(text):
        name, samples, p = f"{line['name']}/{line['ntup']}", int(line["psamples"]), abs(float(line["p"]))  # 0 may be -0
        number = seen[name, samples] = seen.get((name, samples), 0) + 1
        if number > 1:
            name = f"{name}#{number}"
        first = found[name].first_p_value if name in found else p
        found[name] = Outcome(name, int(line["tsamples"]), samples, p, line["word"], first)
    return list(found.values())
