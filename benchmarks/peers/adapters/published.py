"""MeZO's algorithm as published (Malladi et al., arXiv 2305.17333, and princeton-nlp/MeZO), restated: four passes over
the weights with a fresh `torch.normal` for each parameter, and one seed a step.
"""

from __future__ import annotations

from torch import nn

from ...bench.timing import Watch
from ...kernels.baselines import published_pass
from ...step.baseline_steps import Baseline
from ..peer import STRIDE, Loss, Peer, Settings, Step
from ..probes import wrong_step


def load() -> Peer:
    return Peer("MeZO's loop", _make, wrong_step, "a seed each step", how="restated, not its code")


def _make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
    params = list(model.parameters())
    unread = Watch(params[0].device)
    seed = settings.seed * STRIDE
    steps = Baseline(
        params, published_pass, False, loss, unread, settings.eps, settings.lr, [None] * len(params), seed=seed
    )

    def step() -> None:
        steps.spsa()
        unread.clear()

    return step
