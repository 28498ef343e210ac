"""What a run shows: opening lines, curves, closing table."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from zo_kernels import files
from zo_kernels.finetune.folders.metrics import Summary


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss (of each step and on the development split) and the development accuracy or F1 as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r for r in records if r["event"] == "step" and r["loss"] is not None]
    evaluations = [r for r in records if r["event"] == "evaluation" and r["split"] == "dev"]
    # Without pyplot: no global state changes, and no display is needed.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    losses.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="0.75", linewidth=0.7, label="batch")
    losses.plot([r["step"] for r in evaluations], [r["loss"] for r in evaluations], marker="o", label="development")
    losses.set(xlabel="step", ylabel="loss")
    losses.legend()
    metric = "f1" if any("f1" in r for r in evaluations) else "accuracy"
    accuracies.plot([r["step"] for r in evaluations], [r[metric] for r in evaluations], marker="o", color="C2")
    accuracies.set(xlabel="step", ylabel="development " + {"f1": "F1"}.get(metric, metric))
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_rates(record: dict[str, Any], path: Path) -> None:
    """Draw as a PNG what each rate that `--lr auto` tried did to the loss: over its steps, and in the end.

    Args:
        record: of the metrics, "lr".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    over_steps, in_the_end = figure.subplots(1, 2)
    whole = [each for each in record["tried"] if each["gain"] is not None]
    for place, each in enumerate(whole):
        changes = [a - b for a, b in zip(each["losses"], record["baseline"], strict=False)]
        chosen = each["lr"] == record["lr"]
        colour = "C0" if chosen else str(0.8 - 0.5 * place / max(len(whole) - 1, 1))
        over_steps.plot(range(1, len(changes) + 1), changes, color=colour, label=f"{each['lr']:.3g}")
    over_steps.set(xlabel="step", ylabel="loss minus that at lr 0")
    if whole:
        over_steps.legend(title="lr")
    in_the_end.plot([each["lr"] for each in whole], [-each["gain"] for each in whole], marker="o", color="0.5")
    for each in record["tried"]:
        if each["gain"] is None:
            in_the_end.axvline(each["lr"], color="C3", linestyle=":", label="diverged")
    in_the_end.axvline(record["lr"], color="C0", label=f"chosen: {record['lr']:.3g}")
    in_the_end.set(xlabel="lr", ylabel="loss minus that at lr 0, second half", xscale="log")
    rates = [each["lr"] for each in record["tried"]]
    in_the_end.set_xticks(rates, [f"{rate:.2g}" for rate in rates], rotation=30)
    in_the_end.minorticks_off()
    lines, labels = in_the_end.get_legend_handles_labels()
    unique = dict(zip(labels, lines, strict=True))
    in_the_end.legend(unique.values(), unique.keys())
    for axes in (over_steps, in_the_end):
        axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    files.replace(path, picture.getvalue())


def rate_line(record: dict[str, Any], of_run: float) -> str:
    """One line on the rate that was found, and its price. `of_run`: the forwards of the run."""
    sure = "" if record["learned"] else ", which is a guess: no rate lowered the loss"
    forwards = record["forwards"]
    return f"lr {record['lr']:.3g}{sure} (--lr auto: {forwards} forwards, {forwards / of_run:.0%} of the run's)"


def opening_lines(start: dict[str, Any]) -> list[str]:
    """Lines that say what is trained on which data."""
    lines = [
        f"{start['method']}, {start['model']}: {start['weights_trained']:,} of {start['weights']:,} weights trained, "
        f"{start['dtype']}, {start['distribution']} noise",
        f"{_subject(start)}: {start['train']} texts to train on, {start['dev']} for development, "
        f"{start['test']} for the held-out test",
    ]
    if start["cut"]:
        lines.append(f"{start['cut']} texts are longer than {start['max_tokens']} tokens (--max-tokens) and were cut")
    lines += start.get("notes", [])
    if start["dtype"] != "fp32" and start["perturb"] == "in_place":
        lines.append(
            "16-bit weights are perturbed in place: they are rounded three times a step, so they drift (--perturb auto "
            "avoids it)"
        )
    return lines


def _subject(start: dict[str, Any]) -> str:
    labels = ", ".join(start["labels"])
    return f"{start['task']} ({labels})" if "task" in start else labels


def closing_table(summary: Summary) -> Table:
    """A table of the scores before and after, on the held-out test, and of the time and memory used."""
    title = f"held-out test, {summary.test_texts} texts"
    table = Table(title=title, title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    before, after = summary.before, summary.after
    if before.f1 is not None and after.f1 is not None:
        table.add_row("F1", *_change(before.f1, after.f1))
    spread = 100 * math.sqrt(after.accuracy * (1 - after.accuracy) / summary.test_texts)
    share = "accuracy" if after.f1 is None else "exact match"
    table.add_row(f"{share} (± {spread:.1f} points)", *_change(before.accuracy, after.accuracy))
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}", f"{after.loss - before.loss:+.3f}")
    table.add_section()
    table.add_row("time per step", "", f"{1000 * summary.step_seconds:.0f} ms", "")
    table.add_row("  in forwards", "", f"{summary.forward_share:.1%}", "")
    table.add_row("  in our passes", "", f"{summary.pass_share:.1%}", "")
    table.add_row("refused steps", "", str(summary.refused_steps), "")
    table.add_row("peak memory (RSS)", "", f"{summary.peak_rss / 2**20:.0f} MiB", "")
    return table


def _change(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.3f}", f"{after:.3f}", f"{100 * (after - before):+.1f} points"


def closing_line(summary: Summary) -> str:
    """One plain line that scripts can find: `accuracy 0.413 -> 0.512 (+9.9 points) in 187 s`."""
    before, after, change = _change(summary.before.score, summary.after.score)
    return f"{summary.after.metric} {before} -> {after} ({change}) in {summary.seconds:.0f} s"


def peak_rss() -> int:
    """Peak resident memory of this process, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
