"""Suites, the cases that they measure, and the targets that a case may have."""

from __future__ import annotations

import importlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

Row = dict[str, Any]
_AND = "; "  # between targets

SUITES = {
    "kernels": "kernels.cases",
    "step": "step.cases",
    "static": "static.cases",
    "profile": "profile.cases",
    "exactness": "exactness.cases",
    "offload": "offload.cases",
    "claims": "claims.cases",
    "peers": "peers.cases",
    "randomness": "randomness.cases",
    "host": "host.cases",
    "machine": "gpu.machine",
    "bits": "gpu.bits",
}


class Wrong(Exception):
    """What a case measures is not what it should be: its row has `correct: False`, and no figures."""


class Unavailable(Exception):
    """Why a case cannot run here."""


@dataclass(frozen=True)
class Target:
    """A bound on one column of a row."""

    column: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, row: Row) -> bool:
        value = row[self.column]
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        bounds = (("≥", self.at_least), ("≤", self.at_most))
        return ", ".join(f"{self.column} {sign} {bound:.4g}" for sign, bound in bounds if bound is not None)


def judge(row: Row, targets: Sequence[Target]) -> Row:
    """The columns that tell the targets of a row, whether it met all, and which it missed."""
    if not targets:
        return {"target": None, "target_met": None, "target_missed": None}
    missed = [t for t in targets if not t.met(row)]
    return {
        "target": _AND.join(map(str, targets)),
        "target_met": not missed,
        "target_missed": _AND.join(map(str, missed)) or None,
    }


def verdicts(row: Row) -> list[tuple[str, bool]]:
    """Each target of a row, and whether it was met."""
    missed = (row.get("target_missed") or "").split(_AND)
    return [(target, target not in missed) for target in (row.get("target") or "").split(_AND) if target]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        name: unique in its suite; `--only` matches it.
        facts: columns known before anything is measured (backend, device, dtype, elements, ...).
        measure: makes what it needs, checks, measures, and returns rows; raises Wrong or Unavailable. Whatever it
            times goes through `compare`.
        skipped: why the case cannot run here, or None.
        device: whose memory the case needs.
        bytes_needed: tells how much memory the case needs, without allocating it; None: not worth asking.
    """

    name: str
    facts: Row = field(default_factory=dict)
    measure: Callable[[], list[Row]] = list
    skipped: str | None = None
    device: str = "cpu"
    bytes_needed: Callable[[], int] | None = None

    def reason_to_skip(self) -> str | None:
        """Why the case cannot run here now, or None."""
        if self.skipped is not None or self.bytes_needed is None:
            return self.skipped
        from . import memory  # which imports PyTorch

        return memory.lacking(self.device, self.bytes_needed())


class Suite(Protocol):
    """A module of cases.

    It may also have `notes()`, lines to print below its table.
    """

    def cases(self, options: Namespace) -> list[Case]:
        """All cases that the options ask for, including those that cannot run here."""

    def cells(self, row: Row) -> dict[str, str]:
        """What the printed table shows of a row's own results: heading -> text."""


def suite(name: str) -> Suite:
    """Import the module of a suite."""
    return cast(Suite, importlib.import_module(f"benchmarks.{SUITES[name]}"))


def select(cases: Iterable[Case], only: str | None) -> list[Case]:
    """The cases whose name the regular expression matches anywhere."""
    return [case for case in cases if only is None or re.search(only, case.name)]
