"""Runs the cases of a suite, prints what they found and writes the rows."""

from __future__ import annotations

import gc
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch

from . import registry, report, rows
from .registry import Case, Row, Unavailable, Wrong


def run(name: str, options: Namespace) -> int:
    """Run a suite.

    Args:
        name: of the suite.
        options: the suite's own, and `only`, `list`, `json`, `limit`.

    Returns:
        The exit status: 1 if a result was wrong, 2 if no case was chosen, else 0.
    """
    suite = registry.suite(name)
    cases = registry.select(suite.cases(options), options.only)
    if not cases:
        print(f"no case of {name} matches {options.only!r}; --list names them")
        return 2
    if options.list:
        for case in cases:
            reason = case.reason_to_skip()
            print(case.name + ("" if reason is None else f"  (skipped: {reason})"))
        return 0
    found: list[Row] = []
    start, done = time.monotonic(), 0
    try:
        for case in cases:
            if options.limit is not None and time.monotonic() - start > options.limit:
                found.append(_known(case) | {"skipped": f"the run's {options.limit:g} seconds were over"})
            else:
                print(f"{done + 1}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
                found += _measured(case)
            done += 1
    finally:  # an interrupted run keeps what it has
        found += [_known(case) | {"skipped": "the run was interrupted"} for case in cases[done:]]
        found = rows.stamped(found)
        beside = None
        if options.json:
            beside = rows.write(found, Path(options.json))
        report.show(name, found, suite.cells)
        for note in getattr(suite, "notes", list)():
            print(note)
        if beside is not None:
            print(f"rows: {options.json}, {beside}")
    return int(any(row.get("correct") is False for row in found))


def _known(case: Case) -> Row:
    return {"case": case.name, **case.facts}


def _measured(case: Case) -> list[Row]:
    try:
        reason = case.reason_to_skip()
        found = case.measure() if reason is None else [{"skipped": reason}]
    except Wrong as error:
        found = [{"correct": False, "wrong": str(error)}]
    except Unavailable as error:
        found = [{"skipped": str(error)}]
    except torch.OutOfMemoryError as error:
        found = [{"skipped": f"out of memory: {str(error).partition('.')[0]}"}]
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "zo_kernels", "benchmarks"):
            raise
        found = [{"skipped": f"{name} is not installed"}]
    except Exception as error:  # one broken case must not cost the others' results
        found = [{"correct": False, "wrong": f"{type(error).__name__}: {error}"}]
    gc.collect()  # free this case's tensors before the next one makes its own
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [{**_known(case), **row} for row in found]
