"""mezo_svrg (arXiv 2404.08080): the MeZO step of its Lightning module.

Its MeZO-SVRG step is left out: it draws seeds as arrays of one element, of which NumPy 2.4 makes no number.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import checkout
from ..peer import Loss, Peer, Settings, Step
from ..probes import wrong_step

_METHODS = ("efficient_perturb_parameters", "zo_forward_memory_eff", "training_step_ZO")


class _Evaluated:
    """What its forward calls, and takes the first output of."""

    def __init__(self, loss: Loss):
        self._loss = loss

    def eval(self) -> None:
        self._loss.model.eval()

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor]:
        return (self._loss(),)


def load(path: Path) -> Peer:
    given = {"torch": torch, "np": np, "math": math, "time": time}
    module = checkout.methods(path / "models" / "llm_module.py", "GLUETransformer", _METHODS, given)

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = module()
        own.model, own.params = model, list(model.named_parameters())
        own.zero_order_eps, own.learning_rate, own.z_std = settings.eps, settings.lr, 1.0
        own.batchsize_limit = 1
        own.time, own.query = [], []
        own.log_training_loss = lambda *_, **__: None
        own.measure_memory_usage = lambda: None
        evaluated, batch = _Evaluated(loss), {"input_ids": torch.zeros(1, 1)}
        np.random.seed(settings.seed)
        return lambda: own.training_step_ZO(evaluated, batch)

    how = (
        f"{', '.join(_METHODS)} of GLUETransformer, without its logging (a third forward a step); "
        "the rest of its module needs pytorch_lightning"
    )
    return Peer("mezo_svrg", make, wrong_step, "numpy.random.seed", checkout.commit(path), how)
