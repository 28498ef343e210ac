"""Hooks of every module's forward, for when their handles are lost."""

from __future__ import annotations

from typing import Any

from torch.nn.modules import module


def remove_forward_hooks(*hooks: Any) -> None:
    """Take these out of PyTorch's own lists, which are private; where others hold them, nothing is done."""
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks"):
        known = getattr(module, name, {})
        for number in [number for number, hook in list(known.items()) if hook in hooks]:
            known.pop(number, None)
            for beside in ("_global_forward_hooks_always_called", "_global_forward_hooks_with_kwargs"):
                getattr(module, beside, {}).pop(number, None)
