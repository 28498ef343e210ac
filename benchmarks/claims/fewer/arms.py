"""The methods at equal forwards: the library's steps, checked against a twin's, and what it has no option for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo

from ..arms import EPS
from ..learning import Arm
from .twin import Kind, Twin

_CHECKED = 3  # steps
_CHECKED_LR = 1e-3
_PLAIN = Kind()


def forwards_arm(name: str, options: Namespace, kind: Kind, guess: float = 1.0) -> Arm:
    """The library's MeZO with the options of `kind`; each of its bits is the twin's."""

    def make(model: nn.Module, lr: float, seed: int) -> zo.ZeroOrderOptimizer:
        found: dict[str, Any] = {"directions": kind.directions, "distribution": kind.distribution}
        found |= {"estimator": "one_sided"} if kind.one_sided else {}
        if kind.normalize == "rms":
            found["normalize"] = zo.RMS(beta=kind.beta, delta=kind.delta)
        elif kind.normalize != "none":
            found["normalize"] = kind.normalize
        return zo.MeZO(model, lr=lr, eps=EPS, seed=seed, parallel="off", backend=options.backend, **found)

    return Arm(name, make, partial(unlike, make, twin(kind, options)), **_known(kind), guess=guess)


def momentum_arm(name: str, options: Namespace, kind: Kind, guess: float = 1.0) -> Arm:
    """Momentum from replayed scalars: the twin's steps, which without momentum are the library's."""
    checked = partial(unlike, twin(_PLAIN, options), forwards_arm("", options, _PLAIN).make)
    return Arm(name, twin(kind, options), checked, **_known(kind), guess=guess)


def twin(kind: Kind, options: Namespace) -> Callable[[nn.Module, float, int], Twin]:
    return partial(Twin, kind=kind, backend=options.backend)


def _known(kind: Kind) -> dict[str, Any]:
    facts = {"directions": kind.directions, "estimator": "one_sided" if kind.one_sided else "two_sided"}
    facts |= {"normalize": kind.normalize, "distribution": kind.distribution}
    return {"facts": facts | {"momentum": kind.momentum[0] or None}, "forwards": kind.forwards}


def unlike(
    one: Callable[[nn.Module, float, int], Any],
    other: Callable[[nn.Module, float, int], Any],
    steps: object,
    model: nn.Module,
    loss: Callable[[], Tensor],
) -> str | None:
    """Whether two optimizers leave different weights at a closure call or after a few steps, which are undone.

    The second is told the losses of the first: a forward need not repeat its last bits where its memory lies elsewhere.
    """
    params = list(model.parameters())
    before, losses, seen = [p.detach().clone() for p in params], list[Tensor](), list[list[int]]()

    def here() -> list[int]:
        """The sum of the bits of each weight."""
        return [int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in params]

    def first() -> Tensor:
        seen.append(here())
        losses.append(loss().detach())
        return losses[-1]

    given, calls = iter(losses), iter(seen)

    def second() -> Tensor:
        if here() != next(calls, None):
            raise _Unlike
        return next(given)

    ends = []
    try:
        for make, closure in ((one, first), (other, second)):
            optimizer = make(model, _CHECKED_LR, 0)
            for _ in range(_CHECKED):
                optimizer.step(closure)
            ends.append([p.detach().clone() for p in params])
            with torch.no_grad():
                torch._foreach_copy_(params, before)
    except _Unlike:
        return "its weights at a closure call are not those of its twin"
    return None if all(map(torch.equal, *ends)) else f"its weights after {_CHECKED} steps are not those of its twin"


class _Unlike(Exception):
    """Two optimizers have not perturbed weights alike."""
