"""`shared-z`: what writing θ + εz and θ - εz in one pass could save of a step at the most, and what it would cost.

Perturbation in the forward draws z once for each of them. Drawn once for both, the second would still have to be
written, and kept until its forward: that is a copy of the weights, in time and in memory.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch

from zo_kernels.backends.types import Entry, Pass
from zo_kernels.finetune.config import Config
from zo_kernels.ops import Table

from ..bench.compare import Trial, Versus, compare
from ..bench.registry import Row
from ..bench.timing import Call, Plan
from ..kernels.check import wrong_pass
from .demo_task import demo_task

VARIANTS = [{"dtype": "fp32"}, {"dtype": "bf16"}]


def measure(options: Namespace, dtype: str) -> list[Row]:
    task = demo_task(Config(model=options.model, dtype=dtype, threads=options.threads))
    optimizer, batch = task.optimizer("in_forward", "stochastic"), next(task.batches())
    weights = [p.detach() for p in task.trained()]
    entries = [Entry(torch.empty_like(w), w, i) for i, w in enumerate(weights)]
    # round(θ + εz) written beside θ, by one pass over the whole model.
    write = Pass([1], [[1e-3]], [1.0], stochastic=True)
    written = partial(Table(entries, [str(i) for i in range(len(entries))]).apply, write)

    def copied() -> None:
        for e in entries:
            e.dst.copy_(e.src)

    elements = sum(w.numel() for w in weights)
    facts = {"elements": elements, "price_mib": sum(w.nbytes for w in weights) / 2**20}
    others = {"copy_": copied, "step in the forward": lambda: optimizer.step(partial(task.loss, batch))}
    versus = [Versus(name, Call(run, options.threads), facts=facts) for name, run in others.items()]
    trial = Trial(Call(written, options.threads), partial(wrong_pass, entries, write, written), versus, elements)
    rows = compare(trial, Plan(options.rounds, options.seconds), torch.device("cpu"))
    of_copy, of_step = (row["ratio"] for row in rows)
    rows[1]["saved_share_at_most"] = max(0.0, 1.0 - of_copy) / of_step
    return rows


def cells(row: Row) -> dict[str, str]:
    saved = row.get("saved_share_at_most")
    return {
        "ms a pass": f"{row['seconds_median'] * 1e3:,.2f}",
        "saved of a step, at most": "" if saved is None else f"{saved:.1%}",
        "price in MiB": f"{row['price_mib']:.1f}",
    }
