"""Figures drawn from rows that the suites have written; each suite's rows are known by their columns."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .peaks import COPY_FRACTION, GPUS, ISSUED_PER_CLOCK
from .registry import Row
from .terminal import Plain

_COMPILER_OF = {"triton": "triton", "cuda": "nvcc"}  # of a backend
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PARTS = ("forwards", "passes", "other")


def run(files: Sequence[str], out: str) -> int:
    """Draw what the rows of the files allow, and say what they do not.

    Returns:
        The exit status: 2 if a file cannot be read, else 0.
    """
    rows: list[Row] = []
    for file in files:
        try:
            rows += json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            print(f"{file}: expected rows written with --json, got {error}")
            return 2
    drawings: dict[str, Callable[[Any, list[Row]], None]] = {
        "roofline": _roofline,
        "bandwidth": _bandwidth,
        "step": _step,
    }
    for name, draw in drawings.items():
        chosen = _CHOSEN[name](rows)
        if not chosen:
            print(f"{name}: no such rows in these files")
        elif importlib.util.find_spec("matplotlib") is None:
            print(f"{name}: matplotlib is not installed, so this is a table instead of a figure")
            _as_text(name, chosen)
        else:
            print(_drawn(draw, chosen, Path(out, f"{name}.png")))
    return 0


def _drawn(draw: Callable[[Any, list[Row]], None], rows: list[Row], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _as_text(name: str, rows: list[Row]) -> None:
    headings = _SHOWN[name]
    Plain().table(name, "", headings, [[_text(row.get(heading)) for heading in headings] for row in rows])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def roofline_points(rows: Sequence[Row]) -> list[Row]:
    """Each compiled pass on each GPU: instructions a byte, and instructions a second, measured where that GPU's rows
    are among these and predicted elsewhere.
    """
    points = []
    for static in rows:
        if static.get("predicted_gelem_per_s") is None:
            continue
        measured = [r["gelem_per_s"] for r in rows if _is_measurement_of(static, r)]
        rate = max(measured) if measured else static["predicted_gelem_per_s"]
        instructions = static["instructions_per_element"]
        points.append(
            {
                **{name: static[name] for name in ("gpu", "compiler", "kernel", "dtype", "bound")},
                "instructions_per_byte": instructions / static["bytes_per_element"],
                "tera_instructions_per_s": rate * instructions / 1e3,
                "gelem_per_s": rate,
                "is_prediction": not measured,
            }
        )
    return points


def _is_measurement_of(static: Row, row: Row) -> bool:
    """Whether a row of `kernels` timed that very pass on that GPU, on a tensor that no cache holds."""
    if row.get("gelem_per_s") is None or "directions" not in row or row["elements"] < 2**26:
        return False
    name = row["device_name"] or ""
    chip, _, gigabytes = static["gpu"].partition("-")
    return (
        chip in name
        and (not gigabytes or f"{gigabytes}GB" in name)
        and _COMPILER_OF.get(row["backend"]) == static["compiler"]
        and _SHORT[row["dtype"]] == static["dtype"]
        and (row["mask"], row["rounding"]) == (static["mask"], static["rounding"])
        and row["directions"] == 1
        and not row["dropped_share"]
    )


def _roofline(figure: Any, points: list[Row]) -> None:
    axes = figure.subplots()
    names = list(dict.fromkeys(p["gpu"] for p in points))
    low, high = (f(p["instructions_per_byte"] for p in points) for f in (min, max))
    low, high = low / 2, high * 2
    for i, gpu in enumerate(g for g in GPUS if g.name in names):
        issue = gpu.sms * gpu.clock_ghz * ISSUED_PER_CLOCK / 1e3
        copied = COPY_FRACTION * gpu.gb_per_s / 1e3
        knee = issue / copied
        x = sorted({low, high, *([knee] if low < knee < high else [])})
        label = f"{gpu.name}: issue, and {COPY_FRACTION:.0%} of peak bandwidth"
        axes.plot(x, [min(issue, copied * at) for at in x], color=f"C{i}", label=label)
        for predicted, marker in ((True, "o"), (False, "*")):
            here = [p for p in points if p["gpu"] == gpu.name and p["is_prediction"] == predicted]
            if here:
                axes.scatter(
                    [p["instructions_per_byte"] for p in here],
                    [p["tera_instructions_per_s"] for p in here],
                    marker=marker,
                    facecolors="none" if predicted else f"C{i}",
                    edgecolors=f"C{i}",
                    label=f"{gpu.name}: {'predicted, not measured' if predicted else 'measured'}",
                )
    axes.set(xscale="log", yscale="log", xlabel="instructions a byte", ylabel="10¹² thread-instructions a second")
    axes.set_title("Passes of one direction under the roofs of issue and bandwidth")
    axes.legend(fontsize="small")


def bandwidth_rows(rows: Sequence[Row]) -> list[Row]:
    """Plain passes, once each."""
    found = {
        row["case"]: row
        for row in rows
        if row.get("gb_per_s") is not None
        and (row.get("mask"), row.get("directions"), row.get("rounding")) == ("none", 1, "nearest")
        and not row["dropped_share"]
        and row["threads"] in (None, 1)
    }
    return sorted(found.values(), key=lambda row: row["elements"])


def _bandwidth(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["device_name"], row["dtype"], row["backend"]), []).append(row)
    for i, ((_, dtype, backend), line) in enumerate(lines.items()):
        x = [row["elements"] for row in line]
        axes.plot(x, [row["gb_per_s"] for row in line], "o-", color=f"C{i}", label=f"{dtype}, {backend}")
        axes.plot(
            x, [row["copy_gb_per_s"] for row in line], ":", color=f"C{i}", label=f"copy beside {dtype}, {backend}"
        )
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="GB/s read and written")
    axes.set_title(f"Measured: plain passes on {', '.join(dict.fromkeys(row['device_name'] for row in rows))}")
    axes.legend(fontsize="x-small")


def step_rows(rows: Sequence[Row]) -> list[Row]:
    """Those against the published passes, whose parts are shown beside ours."""
    return [
        row
        for row in rows
        if row.get("forwards_seconds_median") is not None and row.get("baseline") == "published passes"
    ]


def _step(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    for side, (who, hatch) in enumerate((("", None), ("baseline_", "//"))):
        places = [i + 0.42 * (side - 0.5) for i in range(len(rows))]
        bottom = [0.0] * len(rows)
        for k, part in enumerate(_PARTS):
            heights = [1e3 * row[f"{who}{part}_seconds_median"] for row in rows]
            label = f"{part}, {'with published passes' if who else 'ours'}"
            axes.bar(places, heights, 0.4, bottom=bottom, color=f"C{k}", hatch=hatch, edgecolor="white", label=label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=30, ha="right", fontsize="small")
    axes.set_ylabel("ms a step")
    axes.set_title(f"Measured: steps on {', '.join(dict.fromkeys(row['device_name'] for row in rows))}")
    axes.legend(fontsize="small")


_CHOSEN: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    "roofline": roofline_points,
    "bandwidth": bandwidth_rows,
    "step": step_rows,
}
_SHOWN = {
    "roofline": (
        "gpu", "compiler", "kernel", "dtype", "bound", "instructions_per_byte", "tera_instructions_per_s",
        "gelem_per_s", "is_prediction",
    ),
    "bandwidth": ("case", "elements", "gb_per_s", "copy_gb_per_s", "share_of_copy"),
    "step": (
        "case", *(f"{who}{part}_seconds_median" for who in ("", "baseline_") for part in _PARTS), "ratio",
    ),
}  # fmt: skip
