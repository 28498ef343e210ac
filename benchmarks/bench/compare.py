"""The only way to a time: the call is checked, then timed in pairs with each of its baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .registry import Row, Target, Wrong, judge
from .timing import Call, Plan, Sample, Timer, alternate, median, quantile

_COPY = "copy"


@dataclass(frozen=True)
class Copy:
    """A copy of memory that measures the bandwidth in the same run."""

    call: Call
    bytes_moved: int  # read and written


@dataclass(frozen=True)
class Versus:
    """A baseline.

    Args:
        name: of the baseline.
        call: does the same work the other way.
        part: the part of the call that the ratio compares; None: the whole call.
        targets: bounds on the row's columns.
        facts: more columns of its row.
    """

    name: str
    call: Call
    part: str | None = None
    targets: Sequence[Target] = ()
    facts: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A case that is ready to be timed.

    Args:
        ours: the call to time.
        check: runs that very call and says what is wrong with its result, or None.
        versus: the baselines, at least one.
        elements: how many elements one call changes.
        bytes_moved: how many bytes one call must read and write; None if the case is not about bandwidth.
        copy: given if `bytes_moved` is.
    """

    ours: Call
    check: Callable[[], str | None]
    versus: Sequence[Versus]
    elements: int
    bytes_moved: int | None = None
    copy: Copy | None = None


def compare(trial: Trial, plan: Plan, device: torch.device) -> list[Row]:
    """A row for each baseline; raises Wrong if the result is."""
    if wrong := trial.check():
        raise Wrong(wrong)
    others = {v.name: v.call for v in trial.versus}
    if trial.copy is not None:
        others[_COPY] = trial.copy.call
    pairs = alternate(trial.ours, others, Timer(device), plan)
    ours = _ours(trial, [a for taken in pairs.values() for a, _ in taken])
    if trial.copy is not None:
        assert trial.bytes_moved is not None
        share = trial.bytes_moved / trial.copy.bytes_moved
        ours["share_of_copy"] = median([share * b.seconds / a.seconds for a, b in pairs[_COPY]])
        ours["copy_gb_per_s"] = trial.copy.bytes_moved / median([b.seconds for _, b in pairs[_COPY]]) / 1e9
    return [_row(trial, ours, v, pairs[v.name]) for v in trial.versus]


def _ours(trial: Trial, samples: Sequence[Sample]) -> Row:
    times = [s.seconds for s in samples]
    seconds = median(times)
    row: Row = {
        "correct": True,
        "samples": len(samples),
        "seconds_median": seconds,
        "seconds_p10": quantile(times, 0.1),
        "seconds_p90": quantile(times, 0.9),
        "cpu_seconds_median": _median([s.cpu_seconds for s in samples]),
        "gelem_per_s": trial.elements / seconds / 1e9,
    }
    if not samples[0].parts:  # else the call waits for the device, and its launch time means nothing
        launch = _median([s.launch_seconds for s in samples])
        row |= {"launch_seconds_median": launch, "launch_dominates": None if launch is None else launch > seconds}
    row |= _parts("", samples)
    if trial.bytes_moved is not None:
        row["gb_per_s"] = trial.bytes_moved / seconds / 1e9
    return row


def _parts(prefix: str, samples: Sequence[Sample]) -> Row:
    row: Row = {}
    for part in samples[0].parts:
        row[f"{prefix}{part}_seconds_median"] = median([s.parts[part] for s in samples])
        row[f"{prefix}{part}_share"] = median([s.parts[part] / s.seconds for s in samples])
    return row


def _row(trial: Trial, ours: Row, versus: Versus, pairs: Sequence[tuple[Sample, Sample]]) -> Row:
    baseline = [b for _, b in pairs]
    ratios = [b.of(versus.part) / a.of(versus.part) for a, b in pairs]
    cpu_ratios = [b.cpu_seconds / a.cpu_seconds if b.cpu_seconds and a.cpu_seconds else None for a, b in pairs]
    alike = versus.part is None and versus.call.threads == trial.ours.threads
    row = {
        **ours,
        "baseline": versus.name,
        "baseline_seconds_median": median([s.seconds for s in baseline]),
        "baseline_cpu_seconds_median": _median([s.cpu_seconds for s in baseline]),
        **_parts("baseline_", baseline),
        "ratio_of": versus.part or "whole",
        "ratio": median(ratios),
        "ratio_p10": quantile(ratios, 0.1),
        "ratio_p90": quantile(ratios, 0.9),
        "cpu_ratio": _median(cpu_ratios) if alike else None,
        **versus.facts,
    }
    return row | judge(row, versus.targets)


def _median(values: Sequence[float | None]) -> float | None:
    """The median of the known values; None if there are none."""
    known = [v for v in values if v is not None]
    return median(known) if known else None
