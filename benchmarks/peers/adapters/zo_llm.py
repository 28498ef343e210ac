"""ZO-LLM (ZO-Bench, arXiv 2402.11592): the ZO-SGD of its trainer, of transformers 4.28."""

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

_METHODS = ("zo_perturb_parameters", "zo_forward", "get_grad_sparsity_by_name", "zo_step", "zo_update")


def load(path: Path) -> Peer:
    trainer = checkout.methods(path / "zo-bench" / "trainer.py", "OurTrainer", _METHODS, {"torch": torch, "np": np})

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = trainer()
        own.args = SimpleNamespace(
            zo_eps=settings.eps,
            trainer="zo_sgd",
            q=1,
            perturbation_mode="two_side",
            non_diff=False,
            n_gpu=1,
            gradient_accumulation_steps=1,
        )
        own.gradient_sparsity = None
        own.sparse_grad_rng, own.sparse_grad_random_seed = torch.Generator(), 0
        own.optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.0)
        own._prepare_inputs = lambda inputs: inputs
        own.compute_loss_context_manager = nullcontext
        own.compute_loss = lambda model, inputs: loss()
        own.lr_scheduler = SimpleNamespace(step=lambda: None)
        np.random.seed(settings.seed)

        def step() -> None:
            own.zo_step(model, None)
            own.zo_update(model)

        return step

    how = f"{', '.join(_METHODS)} of OurTrainer, without sparsity; the rest of its module needs transformers 4"
    return Peer("ZO-LLM", make, wrong_step, "numpy.random.seed", checkout.commit(path), how)
