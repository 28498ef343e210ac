"""`svrg-mlp`: MeZO-SVRG on a small classifier of handwritten digits."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from ...bench.registry import Case
from . import compare
from .compare import cells
from .problems import digits

__all__ = ["cases", "cells"]

_STEPS = 200
_TUNING_SEEDS = range(1000, 1004)  # more than convex problems need: rates that suit one seed let another one diverge


def cases(options: Namespace) -> Iterator[Case]:
    reason = None if importlib.util.find_spec("sklearn") else "scikit-learn is not installed"
    make = partial(digits, options.device or "cpu")
    for case in compare.cases(options, "svrg-mlp", "digits", make, _STEPS, tuning_seeds=_TUNING_SEEDS):
        yield replace(case, skipped=reason)
