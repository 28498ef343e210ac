"""What a stage found, in a line or a few; only of rows that are correct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..bench.registry import Row

Rows = Sequence[Row]
TUNING = "/tuning:"  # in the name of a case: what is changed, against the default
_SUMMARY = re.compile(r"^(?:=+ )?(\d+ \w+.* in [\d.]+s)", re.MULTILINE)  # pytest's last line
_WORDS = (r"FAILED (\S+)", r"ERROR (\S+)", r"SKIPPED (\[\d+\] .*)")
_FEW = 4


def good(rows: Rows) -> list[Row]:
    """Rows whose figures may be told."""
    return [row for row in rows if row.get("correct") is True and row.get("skipped") is None]


@dataclass(frozen=True)
class Tested:
    """What pytest printed: its summary, the tests that failed, those that broke before, and why others were skipped."""

    summary: str
    failed: list[str]
    errors: list[str]
    skipped: list[str]

    @property
    def none_ran(self) -> bool:
        return bool(self.summary) and not self.failed and not self.errors and "passed" not in self.summary

    @property
    def lines(self) -> list[str]:
        """The headlines: all that failed, and what was skipped in a few lines."""
        told = [f"failed: {name}" for name in self.failed] + [f"error: {name}" for name in self.errors]
        return [*filter(None, [self.summary]), *told, *(f"skipped: {reason}" for reason in self.skipped[:_FEW])]


def tested(printed: str) -> Tested:
    summaries = _SUMMARY.findall(printed)
    failed, errors, skipped = (re.findall(rf"^{word}", printed, re.MULTILINE) for word in _WORDS)
    return Tested(summaries[-1] if summaries else "", failed, errors, skipped)


def of(stage: str, rows: Rows) -> list[str]:
    """The headlines of a stage's rows."""
    try:
        lines = _OF[stage](good(rows)) if stage in _OF and good(rows) else []
    except Exception as error:  # the rows are kept; a GPU's minutes are not to end for want of a line about them
        lines = [f"no headline: {type(error).__name__}: {error}"]
    left = Counter(row["skipped"] for row in rows if row.get("skipped") is not None)
    return [*lines, *(f"{n} of {len(rows)} skipped: {reason}" for reason, n in left.items())]


def by_case(rows: Rows) -> list[Row]:
    """The first row of each case; the others differ in what it is compared with."""
    return list({row["case"]: row for row in reversed(rows)}.values())[::-1]


def best_variants(rows: Rows) -> dict[str, Row]:
    """Of each pass, the variant that is the fastest against the default; nothing if the default is."""
    best: dict[str, Row] = {}
    for row in rows:
        stem, mark, _ = row["case"].partition(TUNING)
        if mark and row["ratio_p10"] > 1 and (stem not in best or row["ratio"] > best[stem]["ratio"]):
            best[stem] = row
    return best


def _machine(rows: Rows) -> list[str]:
    row = rows[0]
    parts = [row["device_name"], row["driver"] and f"driver {row['driver']}", f"PyTorch {row['torch_version']}"]
    parts += [row["triton_version"] and f"Triton {row['triton_version']}", f"{row['cores']} cores"]
    return [", ".join(filter(None, parts))]


def _bits(rows: Rows) -> list[str]:
    counts = Counter(row["backend"] for row in rows)
    told = ", ".join(f"{backend} in {n}" for backend, n in counts.items())
    return [f"bits equal to {rows[0]['compared_with']}'s: {told} comparisons"]


def _bandwidth(rows: Rows) -> list[str]:
    """The share of a copy that a plain pass reaches, and then the others."""
    plain, others = [], []
    for row in by_case(rows):
        dtype, backend, *kind = row["case"].split("/")
        text = f"{backend} {dtype}{' ' + kind[0] if kind else ''} {row['share_of_copy']:.0%}"
        (others if kind else plain).append(text)
    return [f"of a copy: {', '.join(texts)}" for texts in (plain, others) if texts]


def _tuning(rows: Rows) -> list[str]:
    best = best_variants(rows)
    stems = dict.fromkeys(row["case"].partition(TUNING)[0] for row in rows)
    return [
        f"{stem}: {best[stem]['case'].partition(TUNING)[2]} {best[stem]['ratio']:.3f} × the default's speed"
        if stem in best
        else f"{stem}: the default"
        for stem in stems
    ]


def _host(rows: Rows) -> list[str]:
    told = (
        f"{row['case']} {row['ours_us_per_module']:.1f} (a step {row['ours_us_per_step']:,.0f})"
        for row in by_case(rows)
    )
    return [f"µs of the host a module and forward: {', '.join(told)}"]


def _steps(rows: Rows) -> list[str]:
    lines = []
    for row in by_case(rows):
        text = f"{row['case']}: {row['step_per_forwards']:.3f} × its forwards, {1e3 * row['seconds_median']:.1f} ms"
        own = [other for other in rows if other["case"] == row["case"]]
        ratios = [f"{other['ratio']:.2f} × {other['baseline']}" for other in own]
        lines.append(f"{text}; speed: {', '.join(ratios)}")
    return lines


def _profile(rows: Rows) -> list[str]:
    longest = max(rows, key=lambda row: row["self_device_seconds"] or row["self_cpu_seconds"] or 0.0)
    seconds = longest["self_device_seconds"] or longest["self_cpu_seconds"]
    return [f"{len(rows)} operations, the longest {longest['operation'][:50]}: {1e3 * seconds:.2f} ms"]


def _ncu(rows: Rows) -> list[str]:
    return [
        f"{row.get('kind') or row['operation'][:30]}: memory {_percent(row, 'ncu_memory_percent')}, compute "
        f"{_percent(row, 'ncu_compute_percent')}, occupancy {_percent(row, 'ncu_occupancy_percent')}, stalls "
        f"{row.get('ncu_stalls') or 'unknown'}"
        for row in rows
    ]


def _percent(row: Row, name: str) -> str:
    return "unknown" if row.get(name) is None else f"{row[name]:.0f} %"


def _offload(rows: Rows) -> list[str]:
    return [
        f"{row['case']}: {1e3 * row['seconds_median']:.0f} ms a step, {1 / row['ratio']:.2f} × with {row['baseline']}, "
        f"{row['copied_gb_per_step'] / row['seconds_median']:.1f} GB/s copied"
        for row in rows
    ]


_OF: dict[str, Callable[[Rows], list[str]]] = {
    "machine": _machine,
    "bits": _bits,
    "bandwidth": _bandwidth,
    "tuning": _tuning,
    "host": _host,
    "step": _steps,
    "step-cuda": _steps,
    "profile": _profile,
    "ncu-triton": _ncu,
    "ncu-cuda": _ncu,
    "offload": _offload,
    "cpu": _bandwidth,
}
