"""Watches every operation of an evaluation for weights that are read where their own module does not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...modes import remove_mode, uncompiled
from ..aliases import Spans, tensors_in, written
from ..owners import Owners

# Pairs of (weight, module that ran). The weight is None for a read of stale memory, the module where none ran.
Reads = set[tuple["int | None", "nn.Module | None"]]

# Operations that use only the shape and dtype of their arguments,
_SHAPE_ONLY = {
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::new_full",
    "aten::new_ones",
    "aten::new_zeros",
    "aten::empty_like",
    "aten::full_like",
    "aten::ones_like",
    "aten::rand_like",
    "aten::randn_like",
    "aten::zeros_like",
    "aten::_has_compatible_shallow_copy_type",
    "aten::is_same_size",
    "aten::result_type",
}
# and those that read their first argument only. (PyTorch shows them undivided in inference mode.)
_FIRST_ONLY = {"aten::expand_as", "aten::reshape_as", "aten::resize_as_", "aten::type_as", "aten::view_as"}


class Watch(TorchDispatchMode):
    """A dispatch mode that calls `on_read(i)` whenever an operation reads memory of the i-th tensor.

    Args:
        tensors: the tensors to watch; they may not overlap.
        stale: whether an address lies in memory that must no longer be read: then `on_read(None)` is called.
        on_read: called for a read, perhaps many times.
        on_write: `on_write(i)` is called, too, if the operation writes to the i-th tensor.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        tensors: Sequence[Tensor],
        stale: Callable[[int], bool],
        on_read: Callable[[int | None], None],
        on_write: Callable[[int], None],
    ):
        super().__init__()
        self._on_write = on_write
        self._spans = Spans(tensors)
        self._stale, self._on_read = stale, on_read
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context for our own operations, which are not watched."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context in which an evaluation is watched."""
        with uncompiled(), self:
            yield

    def leave(self) -> None:
        """Remove the mode from PyTorch's stack if an exception from outside has left it there (`remove_mode`)."""
        remove_mode(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = None
        try:
            result = func(*args, **kwargs)
        finally:  # an operation that failed has read its arguments, too, and may have failed for that reason
            schema = getattr(func, "_schema", None)  # higher-order operators have none
            name, writes = ("", False) if schema is None else (schema.name, schema.is_mutable)
            if not self._paused and name not in _SHAPE_ONLY:
                for t in _tensors(args[:1] if name in _FIRST_ONLY else (args, kwargs)):
                    self._look(t, result, writes)
                for at, its_name in written(func):
                    for t in tensors_in(args[at] if at < len(args) else kwargs.get(its_name)):
                        self._look_at_written(t)
        return result

    def _look_at_written(self, t: Tensor) -> None:
        if t.layout == torch.strided and not t.is_meta and t.numel() and (i := self._spans.find(t)) is not None:
            self._on_write(i)

    def _look(self, t: Tensor, result: Any, writes: bool) -> None:
        if t.layout != torch.strided or t.is_meta or not t.numel():
            return
        i = self._spans.find(t)
        if i is None and not self._stale(t.data_ptr()):
            return
        # An operation that returns a view reads nothing. Schemas do not tell: `to` and `reshape` decide at run time.
        storage = t.untyped_storage().data_ptr()
        results = [] if writes else list(_tensors(result))
        if results and all(r.untyped_storage().data_ptr() == storage for r in results):
            return
        self._on_read(i)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def check_reachable(
    found: Reads, owners: Owners, strangers: set[int], named: Callable[[Iterable[int]], str]
) -> list[tuple[int, nn.Module]]:
    """Return the reads as (weight, module that must be given a copy); raise ValueError if one cannot be perturbed.

    Args:
        found: the reads of an evaluation.
        owners: the modules and the weights that they are given already.
        strangers: weights borrowed in this evaluation by modules outside the tree; those of `found` are added.
        named: lists the names of weights.
    """
    reads = [(i, m) for i, m in found if i is not None]
    if outside := [i for i, m in reads if m is None]:
        raise ValueError(
            f"closure: it reads {named(outside)} where no module runs, so perturbation in the forward cannot reach it; "
            "use perturb='in_place', or read it in the forward of a module"
        )
    if stale := [i for i, m in reads if m is not None and i in owners.owned.get(m, ())]:
        raise ValueError(
            f"closure: a module reads {named(stale)} through a view that was made before its forward, which "
            "perturbation in the forward cannot reach; use perturb='in_place'"
        )
    if len(reads) < len(found):
        raise ValueError(
            "closure: it reads perturbed weights after the forward of their module, in a backward pass or through a "
            "view that was kept, but perturbation in the forward has reused their memory by then; use "
            "perturb='in_place'"
        )
    unknown = {i for i, m in reads if m not in owners.members}
    if anew := unknown & strangers:
        raise ValueError(
            f"closure: a module that is created anew in every call reads {named(anew)}, which perturbation in the "
            "forward cannot reach; use perturb='in_place'"
        )
    strangers |= unknown
    return [(i, m) for i, m in reads if m is not None]
