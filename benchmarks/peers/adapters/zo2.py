"""zo2 (arXiv 2503.12668): its MeZO-SGD on one device. Its offloading needs CUDA, its models transformers 4."""

from __future__ import annotations

import importlib
from itertools import count
from pathlib import Path

import torch
from torch import nn

from .. import checkout
from ..peer import STRIDE, Loss, Peer, Settings, Step
from ..probes import wrong_step


def load(path: Path) -> Peer:
    checkout.bare_package(path / "zo2")
    config = importlib.import_module("zo2.config.mezo_sgd").MeZOSGDConfig
    optimizer = importlib.import_module("zo2.optimizer.mezo_sgd.zo").MeZOSGD

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = optimizer(model, config(lr=settings.lr, eps=settings.eps, weight_decay=0.0, zo2=False))
        own.inner_zo_forward = torch.inference_mode()(lambda: loss())  # which its models' optimizers fill in
        seeds = count(settings.seed * STRIDE)

        def step() -> None:
            own.zo_forward(zo_random_seed=next(seeds))

        return step

    how = "optimizer.mezo_sgd.zo.MeZOSGD; its models need transformers 4, its offloading CUDA"
    return Peer("zo2", make, wrong_step, "zo_random_seed=", checkout.commit(path), how)
