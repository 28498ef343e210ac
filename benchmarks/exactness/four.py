"""`four`: the same run in bf16 under each perturbation and rounding, and in fp32."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from zo_kernels.finetune.config import Config
from zo_kernels.finetune.runs.train import evaluate

from ..bench.registry import Case, Row
from ..step.exact import wrong_step
from .demo_task import DemoTask, demo_task, set_weights, weights_of

_LAST = 50  # steps whose losses are averaged
_MEASURED = ("train_loss", "dev_loss", "test_accuracy")


def cases(options: Namespace) -> Iterator[Case]:
    for dtype, perturb, rounding in (
        ("fp32", "in_place", "nearest"),
        *(("bf16", p, r) for p in ("in_place", "in_forward") for r in ("nearest", "stochastic")),
    ):
        facts = {
            "experiment": "four",
            "device": "cpu",
            "dtype": dtype,
            "perturb": perturb,
            "rounding": rounding,
            "threads": options.threads,
            "steps": options.run_steps,
        }
        measure = partial(_measure, options, dtype, perturb, rounding)
        yield Case("/".join(("four", dtype, perturb, rounding)), facts, measure)


def _measure(options: Namespace, dtype: str, perturb: str, rounding: str) -> list[Row]:
    rows = []
    for seed in options.seeds:
        config = Config(
            model=options.model, dtype=dtype, seed=seed, steps=options.run_steps, lr=options.lr, threads=options.threads
        )
        task = demo_task(config)
        if wrong := _wrong(task, perturb, rounding):
            return [{"correct": False, "wrong": wrong}]
        rows.append({"correct": True, "run_seed": seed, **_run(task, perturb, rounding)})
    return [*rows, _mean(rows)]


def _wrong(task: DemoTask, perturb: str, rounding: str) -> str | None:
    """What is wrong with a first step; the weights are put back."""
    start = weights_of(task.classifier)
    batch = next(task.batches())
    wrong = wrong_step(task.optimizer(perturb, rounding), task.classifier, lambda: task.loss(batch))
    set_weights(task.classifier, start)
    return wrong


def _run(task: DemoTask, perturb: str, rounding: str) -> Row:
    steps, lr = task.config.steps, task.config.lr
    assert lr is not None
    dev, test = evaluate(task.classifier, task.dev), evaluate(task.classifier, task.test)
    row = {"lr": lr, "start_dev_loss": dev.loss, "start_test_accuracy": test.accuracy}
    optimizer = task.optimizer(perturb, rounding)
    losses = task.train(optimizer, task.batches(), [lr * (1 - i / steps) for i in range(steps)])
    updates = [abs(step.rates[0] * step.projected_gradients[0]) for step in optimizer.trajectory]
    dev, test = evaluate(task.classifier, task.dev), evaluate(task.classifier, task.test)
    last = losses[-_LAST:]
    return row | {
        "train_loss": sum(last) / len(last),
        "dev_loss": dev.loss,
        "test_accuracy": test.accuracy,
        "update_median": statistics.median(updates),
    }


def _mean(rows: list[Row]) -> Row:
    """Of all seeds, and how far they spread."""
    mean: Row = {"correct": True, "run_seed": None, "runs": len(rows), "lr": rows[0]["lr"]}
    for key in ("start_dev_loss", "start_test_accuracy", "update_median", *_MEASURED):
        mean[key] = statistics.mean(row[key] for row in rows)
    for key in _MEASURED:
        mean[f"{key}_sd"] = statistics.stdev(row[key] for row in rows) if len(rows) > 1 else None
    return mean


def cells(row: Row) -> dict[str, str]:
    def text(key: str) -> str:
        spread = row.get(f"{key}_sd")
        return f"{row[key]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")

    return {
        "seed": f"mean of {row['runs']}" if row["run_seed"] is None else str(row["run_seed"]),
        "update (median)": f"{row['update_median']:.1e} z",
        "dev loss before": f"{row['start_dev_loss']:.3f}",
        "train loss": text("train_loss"),
        "dev loss": text("dev_loss"),
        "test accuracy": text("test_accuracy"),
    }
