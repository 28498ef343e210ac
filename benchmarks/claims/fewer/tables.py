"""Tables of `fewer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...bench.document import Table, interval, number
from ...bench.registry import Row


def _means(rows: Sequence[Row], experiment: str) -> list[Row]:
    found = [row for row in rows if row.get("claim") == "fewer" and row.get("correct") and row.get("runs")]
    return [row for row in found if row["experiment"] == experiment]


def _rate(row: Row) -> str:
    return f"{row['lr']:.1e}" + (" (edge of those tried)" if row.get("lr_at_edge") else "")


def _losses(row: Row) -> str:
    return f"{row['start_loss']:.3f} → {number(row, 'dev_loss', '.3f')}"


def _window(row: Row) -> str:
    """How many rates, and the ratio of the highest to the lowest."""
    factor = "–" if row["window_factor"] is None else f"{row['window_factor']:.1f}"
    return f"{row['window_rates']}, × {factor}"


def forwards(rows: Sequence[Row]) -> Table:
    lines = []
    for row in _means(rows, "forwards"):
        line = [row["task"], row["arm"], str(row["forwards_per_step"]), _rate(row), _losses(row)]
        own = [interval(row, "dev_loss_difference", "+.3f"), interval(row, "forwards_ratio", ".2f")]
        own += [row["forwards_verdict"] or "–", row["forwards_third_verdict"] or "–"]
        lines.append([*line, *(["–"] * 4 if row["arm"] == row["against"] else own), _window(row)])
    found = "forwards to equal loss, in MeZO's", "fewer than MeZO", "fewer than a third"
    return ("task", "method", "forwards a step", "lr", "dev loss", "minus MeZO's", *found, "rates in the window"), lines


def auto(rows: Sequence[Row]) -> Table:
    seeds = [row for row in rows if row.get("experiment") == "auto" and row.get("run_seed") is not None]
    lines = []
    for row in _means(rows, "auto"):
        diverged = sum(each["case"] == row["case"] and each["dev_loss"] is None for each in seeds)
        verdict = f"{diverged} of {row['runs']} diverged" if diverged else row["loss_verdict"] or "–"
        line = [row["task"], row["arm"], f"{row['grid_lr']:.1e}", f"{row['lr_lowest']:.1e} to {row['lr_highest']:.1e}"]
        line += [f"{row['start_loss']:.3f} → {number(row, 'grid_dev_loss', '.3f')}", number(row, "dev_loss", ".3f")]
        line += [interval(row, "loss_ratio", ".3f"), verdict]
        lines.append([*line, f"{row['forwards_price']:.0f}", f"{row['forwards']:,}"])
    found = "best of the grid", "found", "loss with the grid's", "with the found", "ratio", "within 5 %"
    return ("task", "method", *found, "forwards to find it", "of the run"), lines


def others(rows: Sequence[Row]) -> Table:
    lines = []
    for row in _means(rows, "others"):
        line = [row["task"], row["arm"], row["against"], _rate(row), number(row, "dev_loss", ".3f")]
        line += [interval(row, "dev_loss_difference", "+.3f"), interval(row, "forwards_ratio", ".2f")]
        lines.append([*line, row["forwards_verdict"] or "–", _window(row)])
    found = "loss minus that", "forwards to equal loss, in its", "fewer forwards"
    return ("task", "way", "against", "lr", "dev loss", *found, "rates in the window"), lines


def masks(rows: Sequence[Row]) -> Table:
    """A line for each rate: both masks."""
    pairs: dict[tuple[str, int], dict[bool, Row]] = {}
    for row in _means(rows, "masks"):
        pairs.setdefault((row["task"], row["lr_part_exponent"]), {})[row["redrawn"]] = row
    lines = []
    for (task, exponent), pair in pairs.items():
        kept, redrawn = pair[False], pair[True]
        line = [task, f"{kept['lr']:.1e}", "best" if exponent == 0 else f"best / {2**-exponent}", f"{kept['steps']:,}"]
        line += [_losses(kept), _losses(redrawn), interval(redrawn, "dev_loss_difference", "+.4f")]
        lines.append([*line, *(f"{row['left_mask']:.1%}" for row in (kept, redrawn))])
    found = "kept", "redrawn", "redrawn − kept", "of the small weights grown past the threshold, kept", "redrawn"
    return ("task", "lr", "of kept's rates", "steps", *found), lines


def first_order(rows: Sequence[Row]) -> Table:
    lines = []
    for row in _means(rows, "first-order"):
        line = [row["task"], row["arm"], f"{row['trained']:,}", _rate(row), _losses(row)]
        base = row["arm"] == row["against"]
        line += ["1" if base else interval(row, "forwards_ratio", ".3f"), f"{1e3 * row['step_seconds']:,.1f}"]
        line += ["1" if base else interval(row, "time_to_loss_ratio", ".3f")]
        lines.append([*line, f"{row['memory_mib']:,.2f}", f"{row['memory_mib'] / row['weights_mib']:.2f}"])
    loss = "forwards-equivalents to equal loss, in MeZO's"
    memory = "memory beyond the weights, MiB", "in parts of the weights"
    return ("task", "method", "weights trained", "lr", "dev loss", loss, "ms a step", "time to it", *memory), lines


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "fewer": forwards,
    "fewer-auto": auto,
    "fewer-others": others,
    "fewer-masks": masks,
    "fewer-first-order": first_order,
}
