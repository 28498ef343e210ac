"""PyTorch's modes, made safe against exceptions from outside that come while one is entered or left."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.modules import module
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


def remove_mode(mode: TorchDispatchMode) -> None:
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


def remove_forward_hooks(*hooks: Any) -> None:
    """Remove hooks from PyTorch's private tables of global forward hooks, for when an interrupt took their handles."""
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks"):
        known = getattr(module, name, {})
        for number in [number for number, hook in list(known.items()) if hook in hooks]:
            known.pop(number, None)
            for beside in ("_global_forward_hooks_always_called", "_global_forward_hooks_with_kwargs"):
                getattr(module, beside, {}).pop(number, None)
