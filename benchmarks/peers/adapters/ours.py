"""zo_kernels itself: MeZO, in place or in the forward."""

from __future__ import annotations

from torch import nn

import zo_kernels as zo

from ...step.exact import wrong_step
from ..peer import Loss, Peer, Settings, Step

_TITLES = {"in_place": "zo_kernels", "in_forward": "zo_kernels, in the forward"}
# In the forward, steps up to the 17th that look for weights read elsewhere are slower than the thousands of others.
_WATCHED = {"in_place": 0, "in_forward": 17}


class _OurStep:
    def __init__(self, model: nn.Module, loss: Loss, settings: Settings, perturb: str):
        self._loss = loss
        self.optimizer = zo.MeZO(model, lr=settings.lr, eps=settings.eps, seed=settings.seed, perturb=perturb)

    def __call__(self) -> None:
        self.optimizer.step(self._loss)


def load(perturb: str) -> Peer:
    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        return _OurStep(model, loss, settings, perturb)

    def check(step: Step, loss: Loss, settings: Settings) -> str | None:
        """To the last bit of the noise's specification."""
        assert isinstance(step, _OurStep)
        wrong = wrong_step(step.optimizer, loss.model, loss)
        while wrong is None and step.optimizer.step_count < _WATCHED[perturb]:
            step()
        return wrong

    return Peer(_TITLES[perturb], make, check, "seed=", zo.__version__)
