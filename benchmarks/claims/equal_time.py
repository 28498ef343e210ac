"""Runs of two methods compared by time: curves over steps, and what their steps take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..bench.registry import Row
from .interval import difference, ratio
from .learning import Curve


def by_time(curves: Sequence[Curve], dense: Sequence[Curve], shares: Mapping[str, float]) -> Row:
    """Of a method against MeZO.

    Args:
        curves: of the method, one for each seed.
        dense: MeZO's.
        shares: the time of a step of the method in parts of MeZO's, by whose steps they are.

    Returns: for each of `shares`, under its name WHOSE,
        `WHOSE_step_time_ratio`: the share.
        `WHOSE_time_to_loss_*`: the time in parts of MeZO's until both have reached the higher of the losses that they
        end with (a ratio below 1: faster).
        `WHOSE_equal_time_*`: the difference of their losses when the first of them is done with its steps (below 0:
        lower).
    """
    row: Row = {}
    for whose, share in shares.items():
        row |= _by_time(curves, dense, share, whose)
    return row


def _by_time(curves: Sequence[Curve], dense: Sequence[Curve], share: float, whose: str) -> Row:
    needed, of_mezo, loss, of_mezo_then = [], [], [], []
    for own, mezo in zip(curves, dense, strict=True):
        both = max(own.losses[-1], mezo.losses[-1])
        mine, its = own.reaches(both), mezo.reaches(both)
        needed.append(math.inf if mine is None else mine * share)
        of_mezo.append(math.inf if its is None else its)
        steps = min(own.steps[-1], mezo.steps[-1] / share)
        loss.append(own.at(steps))
        of_mezo_then.append(mezo.at(steps * share))
    return {
        f"{whose}_step_time_ratio": share,
        **ratio(needed, of_mezo, f"{whose}_time_to_loss"),
        **difference(loss, of_mezo_then, f"{whose}_equal_time"),
    }
