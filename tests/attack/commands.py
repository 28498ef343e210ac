"""Attacks that are commands of their own: sanitizers, and ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from attack.workers import Result, expect

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ROOT / "tests" / "attack" / "sanitizers" / "run.py"
Case = str


def cases_of_sanitizers(count: int, seed: int) -> Iterator[Case]:
    yield str(SANITIZERS)


def cases_of_ranks(count: int, seed: int) -> Iterator[Case]:
    """The files of tests that take ranks apart."""
    yield from sorted(str(p) for p in (ROOT / "tests" / "ranks").glob("test_*.py"))[:count]


def attempt(case: Case) -> Result:
    path = Path(case)
    if not path.exists():
        return Result(f"skipped: no {path.name}")
    ranks = path.name.startswith("test_")
    command = (
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", case] if ranks else [sys.executable, case]
    )
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    expect(done.returncode == 0, f"{path.name}: exit {done.returncode}: {' | '.join(lines[-6:])}")
    return Result(lines[-1][:100] if lines else "done")
