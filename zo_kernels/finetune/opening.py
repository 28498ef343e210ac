"""What a run records first: all that decides its bits, so that it is not resumed under other conditions."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import zo_kernels as zo
from zo_kernels.finetune import run_folder
from zo_kernels.finetune.job import Job
from zo_kernels.finetune.metrics import Metrics

_OF_NO_STEP = ("out", "overwrite")  # a folder may be moved


def record_start(job: Job, metrics: Metrics) -> dict[str, Any]:
    """Write the record "start", or compare with the one that is there, and return it.

    Raises ValueError if data, versions or settings have changed.
    """
    start, before = _start(job), metrics.find("start")
    changed = {} if before is None else {k: (before.get(k), v) for k, v in start.items() if before.get(k) != v}
    if changed:
        told = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"--resume: expected what the run was started with: {told}")
    settings = {name: value for name, value in asdict(job.config).items() if name not in _OF_NO_STEP}
    if before is None:
        metrics.write("start", **start, notes=list(job.learner.notes), settings=settings)
    else:
        _check_settings(job.folder / run_folder.CONFIG, before.get("settings", settings), settings)
    return {**start, "notes": job.learner.notes}


def _check_settings(path: Path, before: Any, now: dict[str, Any]) -> None:
    """Raise ValueError naming those that somebody has changed since the run was started."""
    before = before if isinstance(before, dict) else {}
    if changed := [name for name in sorted(now.keys() & before.keys()) if now[name] != before[name]]:
        told = ", ".join(f"{name} {before[name]!r} (now {now[name]!r})" for name in changed)
        raise ValueError(
            f"{path}: expected the settings that the run was started with: {told}: put them back, or start another run"
        )


def _start(job: Job) -> dict[str, Any]:
    config, learner = job.config, job.learner
    parameters = list(learner.predictor.model.parameters())
    return {
        "model": config.model or "all-MiniLM-L6-v2",
        "data": config.data or config.task_data or config.task or "docstrings of the standard library",
        "method": config.method,
        "dtype": config.dtype,
        "labels": list(learner.predictor.names),
        **{name: len(examples) for name, examples in learner.splits.items()},
        "cut": sum(examples.cut for examples in learner.splits.values()),
        "max_tokens": learner.predictor.max_tokens,
        "texts": [examples.digest() for examples in learner.splits.values()],
        "perturb": job.optimizer.perturb,
        "weights": sum(p.numel() for p in parameters),
        "weights_trained": sum(p.numel() for p in parameters if p.requires_grad),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zo_kernels": zo.__version__,
        **learner.facts(),
    }
