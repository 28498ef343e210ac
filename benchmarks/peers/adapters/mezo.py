"""MeZO's own trainer (princeton-nlp/MeZO, large_models/trainer.py), of transformers 4.28."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from .. import checkout
from ..peer import Loss, Peer, Settings, Step
from ..probes import wrong_step

_METHODS = ("zo_perturb_parameters", "zo_forward", "zo_step", "zo_update")


def load(path: Path) -> Peer:
    trainer = checkout.methods(path / "large_models" / "trainer.py", "OurTrainer", _METHODS, {"torch": torch, "np": np})

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = trainer()
        own.args = SimpleNamespace(
            zo_eps=settings.eps, weight_decay=0.0, non_diff=False, n_gpu=1, gradient_accumulation_steps=1
        )
        own._prepare_inputs = lambda inputs: inputs
        own.compute_loss_context_manager = nullcontext
        own.compute_loss = lambda model, inputs: loss()
        own._get_learning_rate = lambda: settings.lr
        own.lr_scheduler = SimpleNamespace(step=lambda: None)
        np.random.seed(settings.seed)

        def step() -> None:
            own.zo_step(model, None)
            own.zo_update(model)

        return step

    how = f"{', '.join(_METHODS)} of OurTrainer; the rest of its module needs transformers 4"
    return Peer("MeZO", make, wrong_step, "numpy.random.seed", checkout.commit(path), how)
