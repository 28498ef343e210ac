"""Writes to weights while a closure is evaluated at others: what is restored after them is not what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..closures.losses import Refused, call
from ..modes import take_off, uncompiled
from ..weights.tables import Weights
from .aliases import Spans

_PLAIN = (Tensor, torch.nn.Parameter)
_CURES = (
    "use perturb='in_forward', which does not move them, or let it write before the optimizer is made (by a forward of "
    "the model), or between two steps"
)


class Guard(TorchDispatchMode):
    """Raises Refused before an operation writes to one of the weights.

    Args:
        weights: plain tensors, none overlapping.
        names: of them.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Sequence[Tensor], names: Sequence[str]):
        super().__init__()
        self._spans, self._names = Spans(weights), names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for at, name in written(func):
            for t in tensors_in(args[at] if at < len(args) else kwargs.get(name)):
                self._check(t, func)
        return func(*args, **kwargs)

    def _check(self, t: Tensor, func: Any) -> None:
        if type(t) not in _PLAIN or t.layout != torch.strided or t.is_meta or not t.numel():
            return
        if (i := self._spans.find(t)) is not None:
            raise Refused(
                ValueError,
                f"it writes to {self._names[i]} ({func._schema.name}) while the weights are perturbed in place, "
                f"and they could not be restored; {_CURES}",
            )


@cache
def written(func: Any) -> tuple[tuple[int, str], ...]:
    """Which arguments of an operation it writes to: position and name."""
    schema = getattr(func, "_schema", None)  # operators of higher order have none
    if schema is None or not schema.is_mutable:
        return ()
    arguments = enumerate(schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Of an argument of an operation."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else []


class Unwritten:
    """Evaluates closures while weights are moved in place, and sees to it that nobody else writes to them meanwhile.

    In evaluations that are `guarded`, what would write is refused before it does. In all of them a write is seen
    afterwards, by PyTorch's counts of the changes of tensors, and `weights.overwritten` says so.

    Args:
        weights: what is moved.
        guarded: whether to look at every operation. That takes some microseconds for each, and what torch.compile has
            compiled runs uncompiled.
    """

    def __init__(self, weights: Weights, guarded: bool):
        self._weights = weights
        self._guard: Guard | None = None
        if guarded and all(type(t) in _PLAIN for t in weights.theta):
            self._guard = Guard(weights.theta, [w.name for w in weights.weights])

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns.

        Raises:
            Refused: it writes to a weight.
        """
        weights, before = self._weights, self._weights.versions()
        try:
            if self._guard is None:
                result = call(closure)
            else:
                with uncompiled(), self._guard:
                    result = call(closure)
        finally:
            if (now := weights.versions()) != before:
                weights.overwritten = True
        if now != before:
            counted = [w.name for w in weights.weights if not w.tensor.is_inference()]
            changed = [name for name, a, b in zip(counted, before, now, strict=True) if a != b]
            raise Refused(
                ValueError,
                f"it wrote to {', '.join(changed[:5])} while the weights were perturbed in place, and what was written "
                f"is mixed with the perturbation; {_CURES}",
            )
        return result

    def leave(self) -> None:
        """After an exception from outside: off PyTorch's stack of modes, should it have left the guard there."""
        if self._guard is not None:
            take_off(self._guard)
