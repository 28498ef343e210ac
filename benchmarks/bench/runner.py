"""Runs the cases of a suite, shows them and writes them down."""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from pathlib import Path

import torch

from . import registry, report, rows
from .registry import Case, Row
from .terminal import Terminal
from .terminal import terminal as here


def run(name: str, options: Namespace, terminal: Terminal | None = None) -> int:
    """Run a suite.

    Args:
        name: of the suite.
        options: the suite's own, and `only`, `list`, `json`, `limit`.

    Returns:
        The exit status: 1 if a result was wrong, 2 if no case was chosen, else 0.
    """
    terminal = terminal or here()
    suite = registry.suite(name)
    cases = registry.select(suite.cases(options), options.only)
    if not cases:
        terminal.line(f"no case of {name} matches {options.only!r}; --list names them")
        return 2
    if options.list:
        report.names(cases, terminal)
        return 0
    results: list[Row] = []
    start = time.monotonic()
    done = 0
    try:
        for case in cases:
            if options.limit is not None and time.monotonic() - start > options.limit:
                results.append(_known(case) | {"skipped": f"the run's {options.limit:g} seconds were over"})
            else:
                with terminal.status(f"{done + 1}/{len(cases)} {case.name}"):
                    results += _measured(case)
            done += 1
    finally:  # an interrupted run keeps what it has
        results += [_known(case) | {"skipped": "the run was interrupted"} for case in cases[done:]]
        stamp = rows.Stamp()
        results = [stamp(row) for row in results]
        columns = getattr(suite, "COLUMNS", rows.COLUMNS)
        beside = rows.write(results, Path(options.json), columns) if options.json else None
        report.show(name, results, suite.cells, terminal)
        for note in getattr(suite, "notes", list)():
            terminal.line(note)
        if beside is not None:
            terminal.line(f"rows: {options.json}, {beside}")
    return int(any(row.get("correct") is False for row in results))


def _known(case: Case) -> Row:
    return {"case": case.name, **case.facts}


def _measured(case: Case) -> list[Row]:
    try:
        if (reason := case.reason_to_skip()) is not None:
            found: list[Row] = [{"skipped": reason}]
        else:
            found = case.measure()
    except torch.OutOfMemoryError as error:
        found = [{"skipped": f"out of memory: {str(error).partition('.')[0]}"}]
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "zo_kernels", "benchmarks"):
            raise
        found = [{"skipped": f"{name} is not installed"}]
    except Exception as error:  # one case that breaks must not cost the others' results
        found = [{"correct": False, "wrong": f"{type(error).__name__}: {error}"}]
    gc.collect()  # the tensors of a case are gone before the next one makes its own
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [{**_known(case), **row} for row in found]
