"""MeZO's steps in trainers of transformers 4.28, with a stand-in for each thing that they find in a Trainer."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from ..peer import Loss, Settings, Step


def zo_steps(own: Any, model: nn.Module, loss: Loss, settings: Settings, **arguments: object) -> Step:
    """`zo_step` and `zo_update` of a trainer that has little else.

    Args:
        own: gets what these methods read, but for the learning rate.
        model: is trained.
        loss: of every step.
        settings: its seed is given to NumPy, which draws the trainer's.
        arguments: more of `args` than the trainers share.
    """
    own.args = SimpleNamespace(zo_eps=settings.eps, non_diff=False, n_gpu=1, gradient_accumulation_steps=1, **arguments)
    own._prepare_inputs = lambda inputs: inputs
    own.compute_loss_context_manager = nullcontext
    own.compute_loss = lambda model, inputs: loss()
    own.lr_scheduler = SimpleNamespace(step=lambda: None)
    np.random.seed(settings.seed)

    def step() -> None:
        own.zo_step(model, None)
        own.zo_update(model)

    return step
