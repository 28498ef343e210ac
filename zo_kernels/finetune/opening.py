"""What a run records first: all that decides its bits, so that it is not resumed under other conditions."""

from __future__ import annotations

import platform
from typing import Any

import torch

import zo_kernels as zo
from zo_kernels.finetune.job import Job
from zo_kernels.finetune.metrics import Metrics


def record_start(job: Job, metrics: Metrics) -> dict[str, Any]:
    """Write the record "start", or compare with the one that is there, and return it.

    Raises ValueError if data or versions have changed.
    """
    start, before = _start(job), metrics.find("start")
    changed = {} if before is None else {k: (before.get(k), v) for k, v in start.items() if before.get(k) != v}
    if changed:
        told = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"--resume: expected what the run was started with: {told}")
    if before is None:
        metrics.write("start", **start)
    return start


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
