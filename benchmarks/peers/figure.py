"""A step's time and extra memory, a bar for each package."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row

_SHAPE = "opt-125m"
_OURS = "zo_kernels"
_INK, _GREY, _FAINT = "#1f2933", "#9aa5b1", "#e4e7eb"
_FORWARDS, _REST, _OURS_REST = "#52606d", "#cbd2d9", "#d64545"


def choose(rows: Sequence[Row]) -> list[Row]:
    """For the shape where passes dominate: ours, and each peer whose time and memory were both measured. MeZO's own
    code stands for MeZO, or its restatement if that is missing.

    Our time is the median of the medians in all peers' runs. Another's is its ratio times ours: the machine was not
    equally fast in all runs, but it was in each pair. With one thread the processor's time is compared, which other
    load hardly changes.
    """
    right = [row for row in rows if row.get("shape") == _SHAPE and row.get("correct")]
    extra = {row["peer"]: row["extra_memory_mib"] for row in right if row.get("experiment") == "memory"}
    timed = [row for row in right if row.get("experiment") == "time"]
    double = "published" if any(row["peer"] == "mezo" for row in timed) else None
    shown = [row for row in timed if row["peer"] in extra and row["peer"] != double]
    if not shown or "ours" not in extra:
        return []
    cpu = "cpu_" if timed[0]["threads"] == 1 else ""
    ours = 1e3 * statistics.median(row[f"{cpu}seconds_median"] for row in timed)
    forwards = statistics.median(row["forwards_share"] for row in timed)
    bars = [_bar(timed[0], _OURS, 1.0, ours, forwards, extra["ours"])]
    for row in shown:
        # In the forward, noise is made while the loss is evaluated: there is no telling them apart.
        share = None if row["peer"] == "ours-in-forward" else row["baseline_forwards_share"]
        bars.append(_bar(row, row["baseline"], row[f"{cpu}ratio"], ours, share, extra[row["peer"]]))
    return sorted(bars, key=lambda bar: bar["ms"])


def _bar(row: Row, peer: str, ratio: float, ours: float, share: float | None, extra: float) -> Row:
    return {
        "peer": peer,
        "ms": ratio * ours,
        "forwards_ms": None if share is None else share * ratio * ours,
        "ratio": ratio,
        "extra_mib": extra,
        **{key: row[key] for key in ("shape", "batch", "tokens", "threads", "elements", "device_name")},
    }


def draw(figure: Any, rows: list[Row]) -> None:
    """Bars of time, split into forwards and the rest, and bars of extra memory beside them."""
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3.2, 1))
    first = rows[0]
    of_processor = " of a processor," if first["threads"] == 1 else ""
    for axes, title in ((time, f"Milliseconds{of_processor} a step"), (memory, "Extra memory, MiB")):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        axes.tick_params(length=0, colors=_GREY, labelsize="small")
        axes.grid(axis="x", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", color=_INK, fontsize="medium")
    kinds = {_FORWARDS: "two forwards", _REST: "noise and weights", _OURS_REST: "noise and weights, ours"}
    for colour, label in kinds.items():
        time.barh(0, 0, 0.62, color=colour, label=label)  # for the legend
    for i, row in enumerate(rows):
        own, forwards, mib = row["peer"].startswith(_OURS), row["forwards_ms"] or 0.0, row["extra_mib"]
        text = {"padding": 6, "color": _INK, "fontsize": "medium", "fontweight": "bold" if own else "normal"}
        colour = _OURS_REST if own else _REST
        time.barh(i, forwards, 0.62, color=_FORWARDS)
        rest = time.barh(i, row["ms"] - forwards, 0.62, left=forwards, color=colour)
        ratio = "" if row["peer"] == _OURS else f"   {row['ratio']:.1f}×"
        time.bar_label(rest, [f"{row['ms']:,.0f} ms{ratio}"], **text)
        memory.bar_label(
            memory.barh(i, mib, 0.62, color=colour), [f"{mib:,.0f}" if mib >= 10 else f"{mib:.1f}"], **text
        )
    time.set_yticks(range(len(rows)), [row["peer"] for row in rows], color=_INK, fontsize="medium")
    for text, row in zip(time.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row["peer"].startswith(_OURS) else "normal")
    memory.tick_params(axis="y", labelleft=False)
    time.invert_yaxis()
    time.set_xlim(0, 1.22 * max(row["ms"] for row in rows))
    memory.set_xlim(0, 1.5 * max(row["extra_mib"] for row in rows) or 1.0)
    time.legend(loc="upper right", frameon=False, labelcolor=_INK, fontsize="small")
    title = f"One MeZO step on {first['shape'].upper()}: the same model, batch, lr and ε"
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize="x-large", fontweight="bold")
    threads = "one thread" if first["threads"] == 1 else f"{first['threads']} threads"
    what = (
        f"{first['elements'] / 1e6:.0f} M weights, fp32, {first['batch']} × {first['tokens']} tokens, {threads}, "
        f"{first['device_name']}. ×: median of pairs timed in turn with our step.\n"
        "Milliseconds: that times the median of our step. In the forward, noise is made within the forwards."
    )
    figure.supxlabel(what, x=0.01, ha="left", color=_GREY, fontsize="small")
