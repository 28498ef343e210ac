"""What perturbation in the forward must amount to: weights perturbed outright, by the primitive on copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scripted import Weights
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import names
from zo_kernels.estimators.draws import direction_seeds


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(
    model: nn.Module,
    weights: Weights,
    along: dict[int, float],
    *,
    masks: Weights | None = None,
    untouched: Any = (),
    decay: Callable[[str], float] = lambda name: 1.0,
    rounding: str = "nearest",
    distribution: str = "normal",
) -> Weights:
    """round(decay * w + m . sum along[seed] * z(seed)) of each of a model's weights; untouched ones as they are."""
    of_module = names.of_module(model)  # which knows the name that counts, should a parameter have several
    ids = names.param_ids(of_module.values())
    out = {name: t.detach().clone() for name, t in weights.items()}
    taking_part = {name: ids[of_module[p]] for name, p in trainable(model).items() if name not in untouched}
    for factor in {decay(name) for name in taking_part}:
        found = [name for name in taking_part if decay(name) == factor]
        zo.add_noise_(
            [out[name] for name in found],
            list(along),
            list(along.values()),
            param_ids=[taking_part[name] for name in found],
            decay=factor,
            masks=None if masks is None else [masks[name] for name in found],
            rounding=rounding,
            distribution=distribution,
        )
    return out


@contextmanager
def holding(model: nn.Module, weights: Weights) -> Iterator[None]:
    """For its time the model has these weights."""
    own = {p: p.data for p in trainable(model).values()}
    try:
        for name, p in trainable(model).items():
            p.data = weights[name]
        yield
    finally:
        for p, data in own.items():
            p.data = data


def losses_outright(
    model: nn.Module, loss: Callable[[], Any], *, seed: int, step: int, eps: float, directions: int = 1
) -> list[float]:
    """The losses of a step of fp32 weights that are neither masked nor dropped, in the order of the evaluations."""
    weights = {name: p.detach() for name, p in trainable(model).items()}
    found = []
    for direction in direction_seeds(seed, step, directions):
        for signed in (eps, -eps):
            torch.clear_autocast_cache()
            with holding(model, moved(model, weights, {direction: signed})), torch.no_grad():
                found.append(float(loss()))
    return found


def bits(t: Tensor) -> bytes:
    """By way of numpy: to read a weight with PyTorch where no module runs is an error in the forward."""
    return t.detach().view({4: torch.int32, 2: torch.int16}[t.element_size()]).numpy().tobytes()
