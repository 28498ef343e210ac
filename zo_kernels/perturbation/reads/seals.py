"""Seals weights while their module does not run: any operation on a sealed weight breaks the seal, and is noticed.

A sealed parameter has another class, whose `__torch_function__` PyTorch calls before every operation on it. Its memory,
address and identity stay the same, and parameters without a seal cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

# These use a tensor without reading its elements,
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
# these read their first argument only,
_AS_OTHERS = {getattr(Tensor, name) for name in ("expand_as", "reshape_as", "to", "type_as", "view_as")}

# and these expose the memory itself: no operation shows who reads it then, such as a Triton kernel.
_BY_ADDRESS = {
    *(getattr(Tensor, name) for name in ("data_ptr", "untyped_storage", "storage", "numpy", "tolist")),
    *(getattr(Tensor, name) for name in ("__array__", "__dlpack__")),
    Tensor.__cuda_array_interface__.__get__,
}

_sealed_now: list[Seals] = []


class Seals:
    """Seals of parameters; a context manager, `with seals.of(indices)`.

    Attributes:
        complete: whether all parameters can be sealed.
        broken: whether a sealed parameter was used. That removes all seals until the next evaluation.
        on_address: set in evaluations that are watched, where seals stay when parameters are used: called with
            the index of a parameter whose memory is exposed.
    """

    on_address: Callable[[int], None] | None = None

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = parameters
        self._plain = [type(p) for p in parameters]
        self._classes = [_sealed(plain) if _can_be_sealed(plain) else plain for plain in self._plain]
        self.complete = all(map(_can_be_sealed, set(self._plain)))
        self._chosen: Sequence[int] = ()
        self._is_sealed = False
        self.broken = False
        self._index = {id(p): i for i, p in enumerate(parameters)}

    def of(self, indices: Iterable[int] | None) -> Seals:
        """Choose the parameters that the context seals; None for all."""
        self._chosen = range(len(self._parameters)) if indices is None else list(indices)
        return self

    def __enter__(self) -> None:
        self.broken = False
        _sealed_now.append(self)
        self._is_sealed = True
        self.seal(self._chosen)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unseal_all()
        self._give_plain()  # another thread may have removed seals while others were being set

    def unseal(self, indices: Iterable[int]) -> None:
        """Remove the seals of a module that begins to run."""
        if self._is_sealed:
            for i in indices:
                self._parameters[i].__class__ = self._plain[i]

    def seal(self, indices: Iterable[int]) -> None:
        """Seal the parameters of a module that has run, unless all seals were removed by now."""
        if self._is_sealed:
            for i in indices:
                self._parameters[i].__class__ = self._classes[i]

    def unseal_all(self) -> None:
        """Remove all seals; it does no harm to call this twice."""
        if self in _sealed_now:
            self._is_sealed = False
            self._give_plain()
            _sealed_now.remove(self)

    def note_address(self, t: Any) -> None:
        """Call `on_address`, if it is set, for a sealed tensor whose memory is exposed."""
        if self.on_address is not None and (i := self._index.get(id(t))) is not None:
            self.on_address(i)

    def _give_plain(self) -> None:
        for p, plain in zip(self._parameters, self._plain, strict=True):
            p.__class__ = plain


def _break_all(*, watched: bool) -> bool:
    """Remove all seals, of whichever optimizer; return whether there were any.

    Which of them was broken is not looked up: for another optimizer, that costs one more evaluation.

    Args:
        watched: also those of evaluations that are watched.
    """
    found = [seals for seals in _sealed_now if watched or seals.on_address is None]
    for seals in found:
        seals.broken = seals.on_address is None
        seals.unseal_all()
    return bool(found)


@functools.cache
def _sealed(plain: type) -> Any:
    """Make the class of sealed parameters whose own class is `plain`."""

    def intercept(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func not in _NO_READS and not (func in _AS_OTHERS and not isinstance(args[0], cls))
        # If the operation has tensors of other such classes, those decide, after ours got its plain class back.
        if func in _BY_ADDRESS:
            for seals in _sealed_now:
                seals.note_address(args[0])
        if (reads or len(types) > 1) and _break_all(watched=len(types) > 1):
            return func(*args, **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)  # a copy has no seal

    named = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain)(
        plain.__name__, (plain,), {**named, "__torch_function__": classmethod(intercept), "__new__": new}
    )


def _can_be_sealed(plain: type) -> bool:
    """Whether a class has no `__torch_function__` or `__torch_dispatch__` of its own."""
    functions = [getattr(t, "__torch_function__", None) for t in (plain, torch.nn.Parameter)]
    return functions[0] == functions[1] and getattr(plain, "__torch_dispatch__", None) in (
        None,
        torch._C._disabled_torch_dispatch_impl,
    )
