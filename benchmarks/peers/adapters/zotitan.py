"""zotitan, from PyPI: its ZOOptimizer, MeZO's settings. Its noise is a Triton kernel's."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import torch
from torch import Tensor, nn

from ..peer import Loss, Peer, Settings, Step, Unavailable
from ..probes import wrong_step


def load(noise: str) -> Peer:
    if noise == "triton" and not torch.cuda.is_available():
        raise Unavailable("zotitan draws its noise with a Triton kernel on a GPU, and PyTorch sees none here")
    train_zo = importlib.import_module("zotitan.train_zo")
    score = importlib.import_module("zotitan.objective").Score
    if noise == "randn":
        vars(train_zo)["_philox_randn"] = _randn

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        config = train_zo.ZOConfig(base=train_zo.BaseTrainConfig(lr=settings.lr), eps=settings.eps)
        own = train_zo.ZOOptimizer(list(model.named_parameters()), config, lambda model, batch: score(loss(), {}))
        return lambda: own.step(model, [{}])

    how = "train_zo.ZOOptimizer"
    if noise == "triton":
        return Peer("zotitan", make, wrong_step, None, version("zotitan"), how)
    how += "; torch.randn, seeded for each parameter alike, in place of its kernel, which needs a GPU"
    return Peer("zotitan (torch.randn)", make, wrong_step, None, version("zotitan"), how)


def _randn(seed: int, n: int, device: torch.device) -> Tensor:
    return torch.randn(n, generator=torch.Generator(device).manual_seed(seed), device=device)
