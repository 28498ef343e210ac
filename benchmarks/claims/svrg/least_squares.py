"""`svrg-least-squares`: MeZO-SVRG on its paper's convex problem, and on one that starts near the optimum."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from ...bench.registry import Case
from . import compare
from .compare import cells
from .problems import least_squares

__all__ = ["cases", "cells"]

_STEPS = 300
_PUBLISHED = {"mezo": (2e-3, None), "svrg-q2": (1e-5, 1e-3), "published-q2": (1e-5, 1e-3)}
_NOISY = 1.0  # label noise: the gradients of minibatches do not vanish at the optimum


def cases(options: Namespace) -> Iterator[Case]:
    far = partial(least_squares, options.device or "cpu")
    near = partial(least_squares, options.device or "cpu", _NOISY, near=True)
    yield from compare.cases(options, "svrg-least-squares", "far", far, _STEPS, _PUBLISHED)
    yield from compare.cases(options, "svrg-least-squares", "near-optimum", near, _STEPS)
