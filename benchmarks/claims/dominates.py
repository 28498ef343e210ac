"""`perturbation-dominates`: the share of a MeZO step that goes to its passes over the weights (arXiv 2410.09823)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from ..bench.registry import Case, Row
from ..step.methods import MEZO
from . import step_times
from .step_times import PUBLISHED, StepTimes
from .tasks import device_of

_CPU = ("opt-125m", ((1, 16), (1, 64), (4, 64), (8, 128)))
_CUDA = ("opt-1.3b", ((1, 64), (4, 64), (16, 64), (1, 256), (4, 256), (16, 256)))
_FAST = ("tiny", ((1, 8), (4, 8)))


def cases(options: Namespace, times: StepTimes) -> Iterator[Case]:
    device = device_of(options)
    shape, batches = _FAST if options.fast else _CUDA if device.type == "cuda" else _CPU
    for batch in batches:
        facts = {"claim": "perturbation-dominates"}
        yield step_times.case(options, times, "", facts, MEZO, (shape, *batch), (PUBLISHED,))


def cells(row: Row) -> dict[str, str]:
    return {
        "tokens": f"{row['batch']} x {row['tokens']}",
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        "passes": f"{row['passes_share']:.1%}",
        "passes, published": f"{row['baseline_passes_share']:.1%}",
    }
