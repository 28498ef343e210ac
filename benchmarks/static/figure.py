"""Passes on GPUs under the roofs of issue and of bandwidth, measured or predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row
from .peaks import COPY_FRACTION, GPUS, ISSUED_PER_CLOCK

_COMPILER_OF = {"triton": "triton", "cuda": "nvcc"}  # of a backend
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def choose(rows: Sequence[Row]) -> list[Row]:
    """A point for each compiled pass and GPU: instructions a byte and a second, measured if these rows hold that GPU's
    times, else predicted.
    """
    points = []
    for static in (row for row in rows if row.get("predicted_gelem_per_s") is not None):
        measured = [row["gelem_per_s"] for row in rows if _is_measurement_of(static, row)]
        rate = max(measured) if measured else static["predicted_gelem_per_s"]
        instructions = static["instructions_per_element"]
        points.append(
            {
                "gpu": static["gpu"],
                "instructions_per_byte": instructions / static["bytes_per_element"],
                "tera_instructions_per_s": rate * instructions / 1e3,
                "is_prediction": not measured,
            }
        )
    return points


def _is_measurement_of(static: Row, row: Row) -> bool:
    """Whether a row of `kernels` timed that very pass on that GPU, on a tensor that no cache holds."""
    if row.get("gelem_per_s") is None or "directions" not in row or row["elements"] < 2**26:
        return False
    chip, _, gigabytes = static["gpu"].partition("-")
    timed = (_COMPILER_OF.get(row["backend"]), _SHORT[row["dtype"]], row["mask"], row["rounding"])
    return (
        all(part in (row["device_name"] or "") for part in (chip, f"{gigabytes}GB" if gigabytes else ""))
        and timed == tuple(static[name] for name in ("compiler", "dtype", "mask", "rounding"))
        and static.get("distribution") == row.get("distribution")
        and row["directions"] == 1
        and not row["dropped_share"]
    )


def draw(figure: Any, points: list[Row]) -> None:
    axes = figure.subplots()
    intensities = [p["instructions_per_byte"] for p in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    names = {p["gpu"] for p in points}
    for i, gpu in enumerate(g for g in GPUS if g.name in names):
        issue = gpu.sms * gpu.clock_ghz * ISSUED_PER_CLOCK / 1e3
        copied = COPY_FRACTION * gpu.gb_per_s / 1e3
        x = [low, max(low, min(high, issue / copied)), high]  # the roofs meet in the middle
        label = f"{gpu.name}: issue, and {COPY_FRACTION:.0%} of peak bandwidth"
        axes.plot(x, [min(issue, copied * at) for at in x], color=f"C{i}", label=label)
        for predicted, marker in ((True, "o"), (False, "*")):
            if here := [p for p in points if p["gpu"] == gpu.name and p["is_prediction"] == predicted]:
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
