"""`perturbation-dominates`: the share of a MeZO step that goes to its passes over the weights (arXiv 2410.09823)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace

from .. import cases_step
from ..registry import Case, Row
from ..step_methods import MEZO
from .tasks import device_of

_CPU = ("opt-125m", ((1, 16), (1, 64), (4, 64), (8, 128)))
_CUDA = ("opt-1.3b", ((1, 64), (4, 64), (16, 64), (1, 256), (4, 256), (16, 256)))
_FAST = ("tiny", ((1, 8), (4, 8)))


def cases(options: Namespace) -> Iterator[Case]:
    device = device_of(options)
    shape, batches = _FAST if options.fast else _CUDA if device.type == "cuda" else _CPU
    for examples, tokens in batches:
        own = Namespace(**vars(options) | {"batch": examples, "tokens": tokens, "dtype": None, "graphed": False})
        case = cases_step.case(shape, "MeZO", MEZO, device, own)
        facts = {"claim": "perturbation-dominates", "experiment": "step", **case.facts}
        name = f"perturbation-dominates/{shape}/{examples}x{tokens}"
        yield replace(case, name=name, facts=facts, measure=_shares(case.measure))


def _shares(measure: Callable[[], list[Row]]) -> Callable[[], list[Row]]:
    def rows() -> list[Row]:
        return [row for row in measure() if row.get("baseline") in (None, "published passes")]

    return rows


def cells(row: Row) -> dict[str, str]:
    return {
        "tokens": f"{row['batch']} x {row['tokens']}",
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        "passes": f"{row['passes_share']:.1%}",
        "passes, published": f"{row['baseline_passes_share']:.1%}",
    }
