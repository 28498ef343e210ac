"""`four`: the same run in bf16 under each perturbation and rounding, and in fp32."""

from __future__ import annotations

import statistics
from argparse import Namespace

from zo_kernels.finetune.config import Config
from zo_kernels.finetune.runs.train import evaluate

from ..bench.registry import Row
from .demo_task import DemoTask, demo_task

VARIANTS = [
    {"dtype": "fp32", "perturb": "in_place", "rounding": "nearest"},
    *(
        {"dtype": "bf16", "perturb": perturb, "rounding": rounding}
        for perturb in ("in_place", "in_forward")
        for rounding in ("nearest", "stochastic")
    ),
]
_LAST = 50  # steps whose losses are averaged
_SPREAD = ("train_loss", "dev_loss", "test_accuracy")


def measure(options: Namespace, dtype: str, perturb: str, rounding: str) -> list[Row]:
    known = {"model": options.model, "dtype": dtype, "threads": options.threads, "lr": options.lr}
    tasks = (demo_task(Config(seed=seed, steps=options.run_steps, **known)) for seed in options.seeds)
    runs = [_run(task, perturb, rounding) for task in tasks]
    mean: Row = {"run_seed": None, "steps": options.run_steps, "runs": len(runs)}
    mean |= {name: statistics.mean(row[name] for row in runs) for name in runs[0] if name not in ("run_seed", "steps")}
    for name in _SPREAD:
        mean[f"{name}_sd"] = statistics.stdev(row[name] for row in runs) if len(runs) > 1 else None
    return [*runs, mean]


def _run(task: DemoTask, perturb: str, rounding: str) -> Row:
    steps, lr = task.config.steps, task.config.lr
    assert lr is not None
    optimizer = task.optimizer(perturb, rounding)
    dev, test = evaluate(task.classifier, task.dev), evaluate(task.classifier, task.test)
    row = {"steps": steps, "run_seed": task.config.seed, "lr": lr}
    row |= {"start_dev_loss": dev.loss, "start_test_accuracy": test.accuracy}
    losses = task.train(optimizer, task.batches(), [lr * (1 - i / steps) for i in range(steps)])
    updates = [abs(step.rates[0] * step.projected_gradients[0]) for step in optimizer.trajectory]
    dev, test = evaluate(task.classifier, task.dev), evaluate(task.classifier, task.test)
    return row | {
        "train_loss": statistics.mean(losses[-_LAST:]),
        "dev_loss": dev.loss,
        "test_accuracy": test.accuracy,
        "update_median": statistics.median(updates),
    }


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
