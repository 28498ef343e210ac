"""`fewer`: forwards to MeZO's loss, the width of the window of rates, what does not help, masks, and first order."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

from ...bench.registry import Case, Row
from ..arms import library
from ..learning import Arm
from ..tasks import LANGUAGE
from . import auto, masks
from .arms import forwards_arm, momentum_arm
from .first_order import costs, first_order
from .study import CHEAP, Equal, studies
from .twin import Kind

_SIGNS = "rademacher"
_NORMALISED = 8.0  # rates of normalised steps are about so many times larger


def cases(options: Namespace) -> Iterator[Case]:
    for task, study in studies(options).items():
        for experiment, name, measure, against in _of_task(options, task, study):
            facts: Row = {"claim": "fewer", "experiment": experiment, "task": task, "dtype": "float32"}
            facts |= {"against": against, "threads": study.threads}
            yield Case(f"fewer/{experiment}/{task}/{name}", facts, measure, study.skipped)


def _of_task(options: Namespace, task: str, study: Equal) -> Iterator[tuple[str, str, Callable[[], list[Row]], str]]:
    """The experiment, the name, what measures it, and what it is compared with."""
    mezo = library("MeZO", options)
    for arm in (mezo, *_forwards(options)):
        yield "forwards", arm.name, partial(study.rows, arm, mezo), mezo.name
    for arm in (mezo, next(_forwards(options))):
        yield "auto", arm.name, partial(auto.found, study, arm), f"{arm.name}, best of the grid"
    for arm in _first_order(mezo):
        yield "first-order", arm.name, partial(_with_costs, study, arm, mezo), mezo.name
    if task in CHEAP:
        for arm, against in _others(options):
            yield "others", arm.name, partial(study.rows, arm, against), against.name
    if task in LANGUAGE:
        yield "masks", "both", partial(masks.compared, study, options), masks.KEPT


def _forwards(options: Namespace) -> Iterator[Arm]:
    """What is to reach MeZO's loss with fewer forwards."""
    yield forwards_arm("FZOO, 8", options, Kind(8, True, "std", _SIGNS), 2 * _NORMALISED)
    yield forwards_arm("MeZO, rms", options, Kind(normalize="rms"), _NORMALISED)
    yield _one_sided_rms(options)


def _one_sided_rms(options: Namespace) -> Arm:
    return forwards_arm("one-sided rms, 8", options, Kind(8, True, "rms", _SIGNS), 2 * _NORMALISED)


def _others(options: Namespace) -> Iterator[tuple[Arm, Arm]]:
    """What is said to help, and against what."""
    mezo = library("MeZO", options)
    signs = {n: forwards_arm(f"signs, {n}", options, Kind(n, distribution=_SIGNS), n**0.5) for n in (1, 4, 16)}
    one_sided = forwards_arm("one-sided, 8", options, Kind(8, True, distribution=_SIGNS), 4.0)
    yield momentum_arm("momentum 0.9, 16 steps", options, Kind(momentum=(0.9, 16)), 0.25), mezo
    yield signs[1], mezo
    yield signs[4], signs[1]
    yield signs[16], signs[1]
    yield one_sided, signs[4]
    for n in (4, 16):
        yield forwards_arm(f"FZOO, {n}", options, Kind(n, True, "std", _SIGNS), _NORMALISED), signs[4]
    yield forwards_arm("two-sided std, 4", options, Kind(4, False, "std", _SIGNS), _NORMALISED), signs[4]
    yield _one_sided_rms(options), one_sided


def _first_order(mezo: Arm) -> Iterator[Arm]:
    yield mezo
    yield first_order("AdamW", adapters=False, guess=2.0)
    yield first_order("LoRA", adapters=True, guess=8.0)


def _with_costs(study: Equal, arm: Arm, mezo: Arm) -> list[Row]:
    rows = study.rows(arm, mezo)
    rows[-1] |= costs(study, arm, mezo)
    return rows
