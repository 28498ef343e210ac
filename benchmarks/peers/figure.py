"""A step's time and extra memory, a bar a package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row

HEADINGS = ("peer", "shape", "ms", "forwards_ms", "ratio", "extra_mib")
_SHAPE = "opt-125m"
_OURS = "zo_kernels"
_INK, _GREY, _FAINT = "#1f2933", "#9aa5b1", "#e4e7eb"
_FORWARDS, _REST, _OURS_REST = "#52606d", "#cbd2d9", "#d64545"


def choose(rows: Sequence[Row]) -> list[Row]:
    """For the shape where passes dominate: ours, and each peer whose time and memory were both measured; of MeZO its
    own code, or where that is not among the rows, its restatement.

    Ours is the median of its medians in all the peers' runs. Another's time is that times its ratio: runs at different
    times, on a machine that was not equally fast in all of them, are compared by their pairs.
    """
    timed = [r for r in rows if r.get("experiment") == "time" and r.get("shape") == _SHAPE and r.get("correct")]
    extra = {
        r["peer"]: r["extra_memory_mib"]
        for r in rows
        if r.get("experiment") == "memory" and r.get("shape") == _SHAPE and r.get("correct")
    }
    own_code = {r["peer"] for r in timed} & {"mezo"}  # of what "published" restates
    shown = [r for r in timed if r["peer"] in extra and not (own_code and r["peer"] == "published")]
    if not shown or "ours" not in extra:
        return []
    ours = 1e3 * _middle([r["cpu_seconds_median" if _by_processor(r) else "seconds_median"] for r in timed])
    share: float | None = _middle([r["forwards_share"] for r in timed])
    bars = [_bar(timed[0], _OURS, 1.0, ours, share, extra["ours"])]
    for r in shown:
        # In the forward, noise is made while the loss is evaluated: there is no telling them apart.
        share = None if r["peer"] == "ours-in-forward" else r["baseline_forwards_share"]
        ratio = r["cpu_ratio"] if _by_processor(r) else r["ratio"]
        bars.append(_bar(r, r["baseline"], ratio, ours, share, extra[r["peer"]]))
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


def _by_processor(row: Row) -> bool:
    """Whether the time that a processor worked is told: with one thread, other load hardly shows in it."""
    return row["threads"] == 1


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def draw(figure: Any, rows: list[Row]) -> None:
    """Bars of time, split into forwards and the rest, and dots of extra memory beside them."""
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3.2, 1))
    places = range(len(rows))
    longest = max(row["ms"] for row in rows)
    for axes in (time, memory):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        axes.tick_params(length=0, colors=_GREY, labelsize="small")
        axes.grid(axis="x", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
    for i, row in enumerate(rows):
        own = row["peer"].startswith(_OURS)
        forwards = row["forwards_ms"] or 0.0
        time.barh(i, forwards, 0.62, color=_FORWARDS)
        time.barh(i, row["ms"] - forwards, 0.62, left=forwards, color=_OURS_REST if own else _REST)
        ratio = "" if row["peer"] == _OURS else f"   {row['ratio']:.1f}×"
        label = f"{row['ms']:,.0f} ms"
        time.annotate(label + ratio, (row["ms"], i), (6, 0), textcoords="offset points", va="center",
                      color=_INK, fontsize="medium", fontweight="bold" if own else "normal")  # fmt: skip
        memory.barh(i, row["extra_mib"], 0.62, color=_OURS_REST if own else _REST)
        memory.annotate(_mib(row["extra_mib"]), (row["extra_mib"], i), (6, 0), textcoords="offset points",
                        va="center", color=_INK, fontsize="medium", fontweight="bold" if own else "normal")  # fmt: skip
    time.set_yticks(places, [row["peer"] for row in rows])
    time.tick_params(axis="y", colors=_INK, labelsize="medium")
    for text, row in zip(time.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row["peer"].startswith(_OURS) else "normal")
    memory.tick_params(axis="y", labelleft=False)
    time.invert_yaxis()
    time.set_xlim(0, 1.22 * longest)
    memory.set_xlim(0, 1.5 * max(row["extra_mib"] for row in rows) or 1.0)
    first = rows[0]
    what = "Milliseconds of a processor, a step" if _by_processor(first) else "Milliseconds a step"
    time.set_title(what, loc="left", color=_INK, fontsize="medium")
    memory.set_title("Extra memory, MiB", loc="left", color=_INK, fontsize="medium")
    patches = [
        _patch(_FORWARDS, "two forwards"),
        _patch(_REST, "noise and weights"),
        _patch(_OURS_REST, "noise and weights, ours"),
    ]
    time.legend(handles=patches, loc="upper right", frameon=False, labelcolor=_INK, fontsize="small")
    figure.suptitle(
        f"One MeZO step on {first['shape'].upper()}: the same model, batch, lr and ε",
        x=0.01, ha="left", color=_INK, fontsize="x-large", fontweight="bold",
    )  # fmt: skip
    figure.supxlabel(
        f"{first['elements'] / 1e6:.0f} M weights, fp32, {first['batch']} × {first['tokens']} tokens, "
        f"{_threads(first['threads'])}, {first['device_name']}. ×: median of pairs timed in turn with our step.\n"
        "Milliseconds: that times the median of our step. In the forward, noise is made within the forwards.",
        x=0.01, ha="left", color=_GREY, fontsize="small",
    )  # fmt: skip


def _mib(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _threads(n: int) -> str:
    return "one thread" if n == 1 else f"{n} threads"


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)
