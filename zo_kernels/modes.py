"""PyTorch's modes and global hooks, and what an exception from outside leaves of them."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.modules import module
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode


def inference_mode(mode: bool) -> AbstractContextManager[object]:
    """A context in which new tensors are inference tensors, or are not; entered only where it is another one.

    Its guard is an object of C++ that puts back the thread's whole state when it goes: where an exception cuts short
    how it is entered or left, that is too late, so it is best not there.
    """
    return nullcontext() if torch.is_inference_mode_enabled() == mode else torch.inference_mode(mode)


def uncompiled() -> AbstractContextManager[object]:
    """What torch.compile would compile while a mode looks at every operation, it would never compile later: so it is
    not asked to meanwhile.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def remove_mode(mode: TorchDispatchMode) -> None:
    """Off PyTorch's stack of modes, where an exception from outside may have left it: one that came while PyTorch took
    it, or let go of it.
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
