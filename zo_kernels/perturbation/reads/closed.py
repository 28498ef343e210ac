"""Weights that are closed while their module does not run: whoever uses one, by whatever operation, is noticed.

PyTorch asks the class of a tensor before every operation on it, if the class wants to be asked, and else at no cost. So
closing is to give a parameter another class; its memory, its address and its identity stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

# What is said about a tensor without reading it.
_ATTRIBUTES = [
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "is_leaf", "grad"),
    *("grad_fn", "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_xla", "is_meta", "is_sparse", "is_sparse_csr"),
    *("is_mkldnn", "is_nested", "is_quantized", "retains_grad", "output_nr", "name", "_version", "_backward_hooks"),
]
_METHODS = [
    *("size", "dim", "numel", "stride", "nelement", "ndimension", "element_size", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_inference", "is_pinned", "is_shared"),
    *("__len__", "is_same_size", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
]
_FUNCTIONS = [
    *("is_floating_point", "is_complex", "numel", "result_type", "is_same_size", "get_device"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
]
_NO_READS = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)),
    *(getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)),
}
# ... and about all but the first.
_AS_OTHERS = {getattr(Tensor, name) for name in ("expand_as", "reshape_as", "to", "type_as", "view_as")}

# What gives the memory itself away: how it is read then, as by a kernel of Triton's, no operation tells.
_BY_ADDRESS = {
    *(getattr(Tensor, name) for name in ("data_ptr", "untyped_storage", "storage", "numpy", "tolist")),
    *(getattr(Tensor, name) for name in ("__array__", "__dlpack__")),
    Tensor.__cuda_array_interface__.__get__,
}

_closed_now: list[Closing] = []


def _open_all(*, watched: bool) -> bool:
    """Whether any was closed. Whose weight was met is not asked: to open others costs them an evaluation.

    Args:
        watched: also of those that are closed in evaluations that are watched.
    """
    met = [closing for closing in _closed_now if watched or closing.on_address is None]
    for closing in met:
        closing.met = closing.on_address is None
        closing.open()
    return bool(met)


@functools.cache
def _closed(plain: type) -> Any:
    """The class of a closed parameter."""

    def meet(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func not in _NO_READS and not (func in _AS_OTHERS and not isinstance(args[0], cls))
        # Where there are tensors of other such classes, these decide, when ours is plain again.
        if func in _BY_ADDRESS:
            for closing in _closed_now:
                closing.meet_address(args[0])
        if (reads or len(types) > 1) and _open_all(watched=len(types) > 1):
            return func(*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)  # as a copy makes one

    named = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain)(plain.__name__, (plain,), {**named, "__torch_function__": classmethod(meet), "__new__": new})


def _can_be_closed(plain: type) -> bool:
    """Whether nobody else wants to be asked."""
    functions = [getattr(t, "__torch_function__", None) for t in (plain, torch.nn.Parameter)]
    return functions[0] == functions[1] and getattr(plain, "__torch_dispatch__", None) in (
        None,
        torch._C._disabled_torch_dispatch_impl,
    )


class Closing:
    """Parameters that can be closed; a context manager within which those are that `of` named.

    Attributes:
        complete: whether all of them can be.
        met: whether one was used while it was closed. Then all are open until they are closed again.
        on_address: where every operation is watched, so that they stay closed: called with the index of one whose
            memory is given away.
    """

    on_address: Callable[[int], None] | None = None

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = parameters
        self._plain = [type(p) for p in parameters]
        self._classes = [_closed(plain) if _can_be_closed(plain) else plain for plain in self._plain]
        self.complete = all(map(_can_be_closed, set(self._plain)))
        self._chosen: Sequence[int] = ()
        self._is_closed = False
        self.met = False
        self._index = {id(p): i for i, p in enumerate(parameters)}

    def meet_address(self, t: Any) -> None:
        """Of a tensor that is closed."""
        if self.on_address is not None and (i := self._index.get(id(t))) is not None:
            self.on_address(i)

    def of(self, indices: Iterable[int] | None) -> Closing:
        """These, or all."""
        self._chosen = range(len(self._parameters)) if indices is None else list(indices)
        return self

    def __enter__(self) -> None:
        self.met = False
        _closed_now.append(self)
        self._is_closed = True
        self.close_again(self._chosen)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.open()
        self._give_plain()  # another thread may have opened them while they were being closed

    def close_again(self, indices: Iterable[int]) -> None:
        """Unless all are open."""
        if self._is_closed:
            for i in indices:
                self._parameters[i].__class__ = self._classes[i]

    def open_for(self, indices: Iterable[int]) -> None:
        """Of a module that runs."""
        if self._is_closed:
            for i in indices:
                self._parameters[i].__class__ = self._plain[i]

    def open(self) -> None:
        """All. It may be called again and again."""
        if self in _closed_now:
            self._is_closed = False
            self._give_plain()
            _closed_now.remove(self)

    def _give_plain(self) -> None:
        for p, plain in zip(self._parameters, self._plain, strict=True):
            p.__class__ = plain
