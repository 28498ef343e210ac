"""`shared-z`: what writing θ + εz and θ - εz in one pass could save of a step at the most, and what it would cost.

Perturbation in the forward draws z once for each of them. Drawn once for both, the second would still have to be
written, and kept until its forward: that is a copy of the weights, in time and in memory.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from zo_kernels.backends.types import Entry, Pass
from zo_kernels.finetune.config import Config
from zo_kernels.ops import Table

from ..bench.compare import Trial, Versus, compare
from ..bench.registry import Case, Row
from ..bench.timing import Call, Plan
from ..kernels.reference_pass import differing, moved
from ..step.exact import wrong_step
from .demo_task import DemoTask, demo_task

_SEED, _EPS = 1, 1e-3
_WINDOW = 4096
_COPY, _STEP = "copy_", "step in the forward"


def cases(options: Namespace) -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        facts = {"experiment": "shared-z", "device": "cpu", "dtype": dtype, "threads": options.threads}
        yield Case(f"shared-z/{dtype}", facts, partial(_measure, options, dtype))


class _OutOfPlace:
    """round(θ + εz) written beside θ, by one pass over the whole model."""

    def __init__(self, weights: list[Tensor]):
        self._from, self.to = weights, [torch.empty_like(w) for w in weights]
        entries = [Entry(to, w, i) for i, (to, w) in enumerate(zip(self.to, weights, strict=True))]
        self._table = Table(entries, [str(i) for i in range(len(weights))])

    def run(self) -> None:
        self._table.apply(Pass([_SEED], [[_EPS]], [1.0], stochastic=True))

    def copy(self) -> None:
        for to, w in zip(self.to, self._from, strict=True):
            to.copy_(w)

    def check(self) -> str | None:
        """Run it, and hold the first elements of each weight against the reference."""
        self.run()
        off = 0
        for i, (to, w) in enumerate(zip(self.to, self._from, strict=True)):
            expected = moved(w.view(-1)[:_WINDOW], _SEED, _EPS, i, rounding="stochastic")
            off += differing(to.view(-1)[:_WINDOW], expected)
        return f"{off} of the weights looked at are not the reference's" if off else None


def _measure(options: Namespace, dtype: str) -> list[Row]:
    task = demo_task(Config(model=options.model, dtype=dtype, threads=options.threads))
    step = _step(task)
    if isinstance(step, str):
        return [{"correct": False, "wrong": step}]
    one = _OutOfPlace([p.detach() for p in task.classifier.parameters() if p.requires_grad])
    elements = sum(w.numel() for w in one.to)
    facts = {"elements": elements, "price_mib": sum(w.nbytes for w in one.to) / 2**20}
    trial = Trial(
        Call(one.run, options.threads),
        one.check,
        [
            Versus(_COPY, Call(one.copy, options.threads), facts=facts),
            Versus(_STEP, Call(step, options.threads), facts=facts),
        ],
        elements,
    )
    rows = compare(trial, Plan(options.rounds, options.seconds), torch.device("cpu"))
    if len(rows) == 2:
        of_copy, of_step = rows[0]["ratio"], rows[1]["ratio"]
        rows[1]["saved_share_at_most"] = max(0.0, 1.0 - of_copy) / of_step
    return rows


def _step(task: DemoTask) -> Callable[[], object] | str:
    """A step of the demo's, checked; or what is wrong with it."""
    optimizer, batch = task.optimizer("in_forward", "stochastic"), next(task.batches())
    loss = partial(task.loss, batch)
    return wrong_step(optimizer, task.classifier, loss) or (lambda: optimizer.step(loss))


def cells(row: Row) -> dict[str, str]:
    saved = row.get("saved_share_at_most")
    return {
        "ms a pass": f"{row['seconds_median'] * 1e3:,.2f}",
        "saved of a step, at most": "" if saved is None else f"{saved:.1%}",
        "price in MiB": f"{row['price_mib']:.1f}",
    }
