"""The only way to a time: the call is checked, then timed in pairs with what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .registry import Row, Target, judge
from .timing import Call, Plan, Sample, Timer, alternate, median, quantile

_COPY = "copy"


@dataclass(frozen=True)
class Copy:
    """A copy of memory to measure the bandwidth with, in the same run."""

    call: Call
    bytes_moved: int  # read and written


@dataclass(frozen=True)
class Versus:
    """What ours is compared with.

    Args:
        name: of the baseline.
        call: the same work, done the other way.
        part: the part of the call that the ratio is of, None for the whole.
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
    """A case made ready.

    Args:
        ours: the call in question.
        check: runs that very call and says what is wrong with its result, or None.
        versus: at least one.
        elements: that one call changes.
        bytes_moved: read and written by one call at the least, None if that is not what the case is about.
        copy: None if `bytes_moved` is.
    """

    ours: Call
    check: Callable[[], str | None]
    versus: Sequence[Versus]
    elements: int
    bytes_moved: int | None = None
    copy: Copy | None = None


def compare(trial: Trial, plan: Plan, device: torch.device) -> list[Row]:
    """A row for each baseline; or, if the result is wrong, one row that says so and has no time."""
    if wrong := trial.check():
        return [{"correct": False, "wrong": wrong}]
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


def _parts(prefix: str, samples: Sequence[Sample]) -> Row:
    row: Row = {}
    for part in samples[0].parts:
        row[f"{prefix}{part}_seconds_median"] = median([s.parts[part] for s in samples])
        row[f"{prefix}{part}_share"] = median([s.parts[part] / s.seconds for s in samples])
    return row


def _ours(trial: Trial, samples: Sequence[Sample]) -> Row:
    times = [s.seconds for s in samples]
    seconds = median(times)
    row = {
        "correct": True,
        "samples": len(samples),
        "seconds_median": seconds,
        "seconds_p10": quantile(times, 0.1),
        "seconds_p90": quantile(times, 0.9),
        "cpu_seconds_median": _median([s.cpu_seconds for s in samples]),
        "gelem_per_s": trial.elements / seconds / 1e9,
        **_launch(samples, seconds),
        **_parts("", samples),
    }
    if trial.bytes_moved is not None:
        row["gb_per_s"] = trial.bytes_moved / seconds / 1e9
    return row


def _launch(samples: Sequence[Sample], seconds: float) -> Row:
    """Whether handing the call to a GPU takes longer than the GPU does: then that is what a caller waits for."""
    if samples[0].parts:  # the host waits for the device within the call
        return {}
    launch = _median([s.launch_seconds for s in samples])
    return {"launch_seconds_median": launch, "launch_dominates": None if launch is None else launch > seconds}


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
    """Of what is known."""
    known = [v for v in values if v is not None]
    return median(known) if known else None
