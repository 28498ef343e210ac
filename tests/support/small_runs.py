"""Runs of a small model whose data go by the step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import real_loss
from scripted import EPS, METHODS, SEED, assert_same, snapshot, take_step
from torch import nn

import zo_kernels as zo

SHAPE = {"depth": 2, "width": 4}


def build(method: str, params: Any, **options: Any) -> zo.ZeroOrderOptimizer:
    if method == "MeZOSVRG":
        options = {"anchor_lr": 1e-2, "anchor_every": 3, "anneal": 2.0, "anneal_above": 1.0, **options}
    return METHODS[method](params, **{"lr": 1e-2, "eps": EPS, "seed": SEED, **options})


def go(opt: zo.ZeroOrderOptimizer, model: nn.Module, steps: int) -> list[dict[str, torch.Tensor]]:
    """Steps on data that go by the step; the weights before the first and after each."""
    seen = [snapshot(model)]
    for _ in range(steps):
        i = opt.step_count
        take_step(opt, lambda i=i: real_loss(model, i), lambda: real_loss(model, 1000))
        seen.append(snapshot(model))
    return seen


def same_after_replay(start: nn.Module, trajectory: Any, upto: int | None, expected: Any, **options: Any) -> None:
    model = copy.deepcopy(start)
    zo.replay(model, trajectory, upto, **options)
    assert_same(snapshot(model), expected)
