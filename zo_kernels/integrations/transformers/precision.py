"""Compute the losses of 16-bit models in float32.

A loss near 0.7 in bfloat16 is a multiple of 2^-8, and (L+ - L-) / 2 eps with eps = 1e-3 therefore a multiple of 2.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zo_kernels import ZeroOrderOptimizer

_FUNCTIONAL = vars(functional)
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# Those of torch.nn.functional; the modules of torch.nn call them there.
_LOSSES: tuple[str, ...] = tuple(
    name
    for name in (
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cosine_embedding_loss",
        "cross_entropy",
        "ctc_loss",
        "gaussian_nll_loss",
        "hinge_embedding_loss",
        "huber_loss",
        "kl_div",
        "l1_loss",
        "margin_ranking_loss",
        "mse_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "nll_loss",
        "poisson_nll_loss",
        "smooth_l1_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "triplet_margin_with_distance_loss",
    )
    if name in _FUNCTIONAL
)


class _Replaced:
    """Replaces the loss functions of PyTorch while float32 losses are needed.

    A torch function mode would do the same, but it sees every call and takes 8 % of a forward of MiniLM.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._own: dict[str, Any] = {}
        self._others: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                own = {name: _FUNCTIONAL[name] for name in _LOSSES}
                if own != self._own:  # others may have replaced them, too
                    self._own, self._others = own, {name: _of_float32(function) for name, function in own.items()}
                _FUNCTIONAL.update(self._others)
            self._users += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                _FUNCTIONAL.update(self._own)


_replaced = _Replaced()


@functools.cache  # one object for ever, or torch.compile would compile anew
def _of_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def loss(*args: Any, **named: Any) -> Any:
        if named.get("reduction") == "none":  # perhaps part of the model, not its loss
            return function(*args, **named)
        return function(*map(_raised, args), **{name: _raised(value) for name, value in named.items()})

    return loss


def _raised(value: Any) -> Any:
    """A 16-bit tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _SIXTEEN_BITS else value


class _OnLogits:
    """Wraps a function of a model's outputs, so that it gets 16-bit logits in float32."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, outputs: Any, *more: Any, **named: Any) -> Any:
        return self._function(_with_raised_logits(outputs), *more, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def _with_raised_logits(outputs: Any) -> Any:
    """The outputs with float32 logits. A copy if anything changes, since others use the outputs, too."""
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
        if _raised(logits) is logits:
            return outputs
        parts: dict[str, Any] = {**outputs, "logits": _raised(logits)}
        return type(outputs)(**parts) if type(outputs) is not dict else parts
    if isinstance(outputs, tuple) and not hasattr(outputs, "_fields") and outputs:
        return (_raised(outputs[0]), *outputs[1:])
    return outputs


@contextmanager
def float32_losses(trainer: Any) -> Iterator[None]:
    """Let losses of torch.nn, label smoothing and `compute_loss_func` compute in float32 from 16-bit logits.

    The rest of the forward does not change.
    """
    own = trainer.label_smoother, trainer.compute_loss_func
    trainer.label_smoother, trainer.compute_loss_func = (f if f is None else _OnLogits(f) for f in own)
    try:
        with _replaced:
            yield
    finally:
        trainer.label_smoother, trainer.compute_loss_func = own


def doubt_16_bits(optimizer: ZeroOrderOptimizer, loss: Any) -> None:
    """Warn once if a loss is still in 16 bits, with the resolution that this leaves to the projected gradient.

    A strict optimizer raises ValueError instead.
    """
    if not isinstance(loss, Tensor) or loss.dtype not in _SIXTEEN_BITS:
        return
    about, warner = "resolution", optimizer._warner
    if warner.warned(about):  # before its value is waited for
        return
    value, eps = float(loss.detach().abs().max()), optimizer.param_groups[0]["eps"]
    if not (math.isfinite(value) and value > 0):
        return
    spacing = 2.0 ** math.floor(math.log2(value)) * torch.finfo(loss.dtype).eps
    warner.warn(
        about,
        f"compute_loss: expected a loss in float32, got one in {str(loss.dtype).removeprefix('torch.')}: near "
        f"{value:.3g} it is a multiple of {spacing:.2g}, so that the projected gradient is one of "
        f"{spacing / (2 * eps):.3g} (eps={eps:g}), and mostly 0. Compute it from logits.float(), or raise eps",
    )
