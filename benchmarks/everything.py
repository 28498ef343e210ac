"""`all`: the suites one after the other, each in a process of its own with a time limit; then figures of their rows.

What fails costs only itself. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_TO_WRITE_SECONDS = 8.0  # for a process that was told to stop to write what it has
_SLACK = 1.25  # of a part's time, begins no case after the time and is stopped after so much more
_PLOT_SHARE = 0.05  # with it, the slack and the time to write, the shares below make less than the whole
_GPU_ELEMENTS = (2**28, 2**30, 2**20, 2**10, 2**24, 2**16)  # when time runs out, what is lost is the last ones'
_CPU_ELEMENTS = (2**24, 2**20, 2**16, 2**10)
_GPU_SHAPES, _CPU_SHAPES = ("opt-1.3b", "llama-7b", "opt-13b"), ("minilm",)
_GPU_CASES = "^[^/]*/(triton|cuda)"


@dataclass(frozen=True)
class Part:
    """A suite, its arguments, and its share of the time."""

    suite: str
    arguments: list[str]
    share: float


def run(options: Namespace) -> int:
    """Run all parts.

    Returns:
        The exit status: 1 if a result was wrong, else 3 if a part failed, else 0.
    """
    gpu = _gpu()
    if gpu is None:
        print("PyTorch sees no GPU here: what needs none runs, on the CPU")
    out = Path(options.out) if options.out else _folder(gpu)
    out.mkdir(parents=True, exist_ok=True)
    print(f"results: {out}", flush=True)
    seconds = 60 * options.minutes
    suites = parts(options, out, on_gpu=gpu is not None)
    for part in suites:  # rows of an earlier run would be taken for this one's
        _rows(out, part.suite).unlink(missing_ok=True)
    statuses = [_run(part, out, seconds * part.share) for part in suites]
    written = [file for part in suites if (file := _rows(out, part.suite)).exists()]
    if written:
        plot = [*_command("plot"), *map(str, written), "--out", str(out)]
        statuses.append(_wait(plot, seconds * _PLOT_SHARE))
    if wrong := [row["case"] for file in written for row in json.loads(file.read_text()) if row["correct"] is False]:
        print(f"WRONG: {', '.join(wrong)}")
        return 1
    return 3 if any(statuses) else 0


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _folder(gpu: str | None) -> Path:
    return _ROOT / "runs" / "benchmarks" if gpu is None else _ROOT / "docs" / "gpu" / "-".join(gpu.split())


def _rows(out: Path, suite: str) -> Path:
    return out / f"{suite}.json"


def parts(options: Namespace, out: Path, *, on_gpu: bool) -> list[Part]:
    """In the order in which they run."""
    elements = [str(n) for n in options.elements or (_GPU_ELEMENTS if on_gpu else _CPU_ELEMENTS)]
    shapes = options.shape or (_GPU_SHAPES if on_gpu else _CPU_SHAPES)
    only = options.only or (_GPU_CASES if on_gpu else "")
    kernels = ["--elements", *elements, "--only", only, "--rounds", "5", "--seconds", "0.2"]
    step = ["--shape", *shapes, "--rounds", "3", "--seconds", "1.5"]
    profile = ["--shape", shapes[0], "--elements", elements[0], "--dtype", "bf16", "--out", str(out / "profile")]
    return [
        Part("static", [], 0.08),
        Part("kernels", kernels, 0.33 if on_gpu else 0.43),
        Part("step", step, 0.18),
        *([Part("offload", ["--rounds", "3", "--seconds", "1.5"], 0.08)] if on_gpu else []),
        Part("profile", profile, 0.05),
    ]


def _command(suite: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", suite]


def _run(part: Part, out: Path, seconds: float) -> int:
    rows = ["--json", str(_rows(out, part.suite)), "--limit", f"{seconds:.0f}"]
    return _wait([*_command(part.suite), *part.arguments, *rows], _SLACK * seconds)


def _wait(command: list[str], seconds: float) -> int:
    """The exit status of a process, which is told to stop, and at last killed, if it takes longer."""
    print(f"{' '.join(command[1:])} (at most {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=_ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            status = process.wait(_TO_WRITE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    print(f"{command[3]}: exit status {status} after {time.monotonic() - start:.0f} s", flush=True)
    return status
