"""PyTorch's modes, made safe against exceptions from outside that come while one is entered or left."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode


def inference_mode(mode: bool) -> AbstractContextManager[object]:
    """`torch.inference_mode(mode)`, or an empty context where that mode holds already.

    PyTorch's guard restores the thread's whole state when it is destroyed. If an exception cuts its entry or exit
    short, that is too late, so it is not used unless it is needed.
    """
    return nullcontext() if torch.is_inference_mode_enabled() == mode else torch.inference_mode(mode)


def uncompiled() -> AbstractContextManager[object]:
    """A context in which torch.compile runs everything eagerly.

    A function that it first meets while a mode watches every operation is never compiled later either.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def take_off(mode: TorchDispatchMode) -> None:
    """Take a mode off the top of PyTorch's stack, where an exception from outside may have left it while it was entered
    or left.
    """
    stack = _get_current_dispatch_mode_stack()
    if not stack or stack[-1] is not mode:
        return
    if mode.old_dispatch_mode_flags:
        mode.__exit__(None, None, None)
    else:
        _pop_mode(None)
