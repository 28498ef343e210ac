"""Optimizers that perturb in the forward, options that are tried with them, and what a step may not leave behind."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from scripted import (
    EPS,
    METHODS,
    SEED,
)
from torch import nn
from torch.nn.modules import module as torch_module

import zo_kernels as zo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = st.fixed_dictionaries(
    {
        "directions": st.integers(1, 2),
        "sparsity": st.sampled_from([0.0, 0.5, 0.75]),
        "drop": st.sampled_from([0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "rounding": st.sampled_from(["auto", "nearest"]),
        "distribution": st.sampled_from(["normal", "rademacher"]),
    }
)
OUTPUTS = st.sampled_from([3, 50])  # with 50, the head is so large that a block is perturbed as one
quickly = partial(settings, deadline=None, database=None, derandomize=True)


def build(method: str, model: nn.Module, lr: float = 0.0, **options: Any) -> zo.ZeroOrderOptimizer:
    if method == "MeZOSVRG":
        options = {"anchor_lr": lr, "anchor_every": 2, **options}
    if method == "FZOO":
        options["directions"] = 1 + options.get("directions", 1)
    options = {"eps": EPS, "seed": SEED, "drop": 0.0, "perturb": "in_forward", **options}
    return METHODS[method](model, lr=lr, **options)


def nothing_left_behind() -> bool:
    hooks = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks_always_called,
        torch_module._global_forward_hooks_with_kwargs,
    )
    return not any(hooks)
