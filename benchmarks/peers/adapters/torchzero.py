"""torchzero, from PyPI: its MeZO module with Gaussian noise, and a learning rate."""

from __future__ import annotations

import importlib
from importlib.metadata import version

from torch import Tensor, nn

from ..peer import Loss, Peer, Settings, Step
from ..probes import wrong_step


def load() -> Peer:
    tz = importlib.import_module("torchzero")

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        # `return_approx_loss` spares a third forward; the module's default noise is Rademacher's.
        mezo = tz.m.MeZO(h=settings.eps, distribution="gaussian", return_approx_loss=True)
        optimizer = tz.Optimizer(model.parameters(), mezo, tz.m.LR(settings.lr))

        def closure(backward: bool = True) -> Tensor:
            return loss()

        return lambda: optimizer.step(closure)

    how = 'm.MeZO(distribution="gaussian", return_approx_loss=True), m.LR'
    return Peer("torchzero", make, wrong_step, None, version("torchzero"), how)
