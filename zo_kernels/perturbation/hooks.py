"""Removes global forward hooks whose handles were lost."""

from __future__ import annotations

from typing import Any

from torch.nn.modules import module


def remove_forward_hooks(*hooks: Any) -> None:
    """Remove hooks from PyTorch's private tables of global forward hooks, for when an interrupt took their handles."""
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks"):
        known = getattr(module, name, {})
        for number in [number for number, hook in list(known.items()) if hook in hooks]:
            known.pop(number, None)
            for beside in ("_global_forward_hooks_always_called", "_global_forward_hooks_with_kwargs"):
                getattr(module, beside, {}).pop(number, None)
