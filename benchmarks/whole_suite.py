"""The whole test suite, and how much of it did not run: python -m benchmarks.whole_suite [PYTEST OPTIONS]"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

_SKIPPED = re.compile(r"SKIPPED \[(\d+)\] (.*)")
_NEEDS_GPU = re.compile(r"GPU|CUDA", re.IGNORECASE)


def skipped(summary: Iterable[str]) -> tuple[int, int]:
    """How many tests pytest's -rs summary says were skipped, and how many of them for want of a GPU."""
    found = [match for line in summary if (match := _SKIPPED.match(line))]
    counts = [(int(match[1]), bool(_NEEDS_GPU.search(match[2].partition(": ")[2]))) for match in found]
    return sum(n for n, _ in counts), sum(n for n, of_gpu in counts if of_gpu)


def verdict(summary: Iterable[str], gpu: str | None) -> str:
    every, of_gpu = skipped(summary)
    if gpu is None:
        return f"PyTorch sees no CUDA GPU here: {of_gpu} tests that need one were skipped, {every} in all."
    return f"On {gpu}: {every} tests were skipped, {of_gpu} of them for want of a GPU, CUDA or what they need of it."


def main(arguments: Sequence[str]) -> int:
    import torch

    side_by_side = ["-n", "4", "--dist", "loadfile"]
    if importlib.util.find_spec("xdist") is None:
        side_by_side = []
        print("pytest-xdist is not installed: one test at a time")
    command = [sys.executable, "-m", "pytest", *side_by_side, "-rs", *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    print(verdict(lines, torch.cuda.get_device_name() if torch.cuda.is_available() else None))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
