"""MeZO's own trainer (princeton-nlp/MeZO, large_models/trainer.py), of transformers 4.28."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import checkout
from ..peer import Loss, Peer, Settings, Step
from ..probes import wrong_step
from .trainers import zo_steps

_METHODS = ("zo_perturb_parameters", "zo_forward", "zo_step", "zo_update")


def load(path: Path) -> Peer:
    trainer = checkout.methods(path / "large_models" / "trainer.py", "OurTrainer", _METHODS, {"torch": torch, "np": np})

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = trainer()
        own._get_learning_rate = lambda: settings.lr
        return zo_steps(own, model, loss, settings, weight_decay=0.0)

    how = f"{', '.join(_METHODS)} of OurTrainer; the rest of its module needs transformers 4"
    return Peer("MeZO", make, wrong_step, "numpy.random.seed", checkout.commit(path), how)
