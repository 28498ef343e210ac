"""ZO-LLM (ZO-Bench, arXiv 2402.11592): the ZO-SGD of its trainer, of transformers 4.28."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import checkout
from ..peer import Loss, Peer, Settings, Step
from ..probes import wrong_step
from .trainers import zo_steps

_METHODS = ("zo_perturb_parameters", "zo_forward", "get_grad_sparsity_by_name", "zo_step", "zo_update")


def load(path: Path) -> Peer:
    trainer = checkout.methods(path / "zo-bench" / "trainer.py", "OurTrainer", _METHODS, {"torch": torch, "np": np})

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = trainer()
        own.gradient_sparsity = None
        own.sparse_grad_rng, own.sparse_grad_random_seed = torch.Generator(), 0
        own.optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.0)
        return zo_steps(own, model, loss, settings, trainer="zo_sgd", q=1, perturbation_mode="two_side")

    how = f"{', '.join(_METHODS)} of OurTrainer, without sparsity; the rest of its module needs transformers 4"
    return Peer("ZO-LLM", make, wrong_step, "numpy.random.seed", checkout.commit(path), how)
