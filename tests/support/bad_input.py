"""Rows of tables of bad input: a call, the error that it raises, and what the message says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

NAN, INF = math.nan, math.inf
TOO_LARGE = 1e39  # finite, but infinite in float32, where the arithmetic is done

Row = tuple[Callable[..., Any], type[Exception], str]


def shown(value: Any) -> str:
    """For the row's name."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value.dtype}{list(value.stride())}@{value.device}" if isinstance(value, Tensor) else str(value)


def rows(name: str, call: Callable[[Any], Any], *cases: tuple[Any, type[Exception], str]) -> dict[str, Row]:
    """Rows that differ in one value: the message begins with the argument's name and ends with what came."""
    out: dict[str, Row] = {}
    for value, error, came in cases:
        out[f"{name}={shown(value)}"] = (lambda w, v=value: call(w, v), error, came)
    return out
