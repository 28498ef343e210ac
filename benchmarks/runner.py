"""Runs the cases of a suite, shows them and writes them down."""

from __future__ import annotations

import gc
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from . import registry, report, rows
from .registry import Case, Row


def run(name: str, options: Namespace, console: Console | None = None) -> int:
    """Run a suite.

    Args:
        name: of the suite.
        options: the suite's own, and `only`, `list`, `json`.

    Returns:
        The exit status: 1 if a result was wrong, 2 if no case was chosen, else 0.
    """
    console = console or report.console()
    suite = registry.suite(name)
    cases = registry.select(suite.cases(options), options.only)
    if not cases:
        console.print(f"no case of {name} matches {options.only!r}", markup=False)
        return 2
    if options.list:
        report.names(cases, console)
        return 0
    results: list[Row] = []
    try:
        for number, case in enumerate(cases, 1):
            now = f"{number}/{len(cases)} {case.name}"
            if not console.is_terminal:
                print(now, file=sys.stderr, flush=True)
            with console.status(escape(now)):
                results += _measured(case)
    finally:  # an interrupted run keeps what it has
        stamp = rows.Stamp()
        results = [stamp(row) for row in results]
        beside = rows.write(results, Path(options.json)) if options.json else None
        report.show(name, results, suite.cells, console)
        if beside is not None:
            console.print(f"rows: {options.json}, {beside}", highlight=False, soft_wrap=True, markup=False)
    return int(any(row.get("correct") is False for row in results))


def _measured(case: Case) -> list[Row]:
    known: Row = {"case": case.name, **case.facts}
    if case.skipped is not None:
        return [{**known, "skipped": case.skipped}]
    try:
        found = case.measure()
    except Exception as error:  # one case that breaks must not cost the others' results
        found = [{"correct": False, "wrong": f"{type(error).__name__}: {error}"}]
    gc.collect()  # the tensors of a case are gone before the next one makes its own
    return [{**known, **row} for row in found]
