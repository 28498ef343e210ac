"""Is a step right? What modules run on in every closure call, and the end, are compared with the method's formula.

Steps of SPSA are followed to the last bit, by the noise's specification; those of MeZO-SVRG by their formula in
float64. The losses are those of the very step that is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import ANCHOR_SLOT, BLOCK_SLOT, SEPARATE_SLOT
from zo_kernels.spec import direction_seed, fma, noise, round_stochastic, rounding_bits
from zo_kernels.weights.blocks import dropped_blocks, find_blocks

from ..bench.registry import Wrong
from .check import Windows

# How far MeZO-SVRG's passes in place may leave its formula, in parts of |θ| + ε|z|. Each rounds by up to 2^-24 in
# float32, and by the last of 8 or of 11 bits in the others, which round stochastically.
_TOLERANCE = {torch.float32: 2.0**-21, torch.bfloat16: 3 * 2.0**-7, torch.float16: 3 * 2.0**-10}
_MOST_Z = 7  # bounds |z|


def wrong_step(
    optimizer: zo.ZeroOrderOptimizer,
    model: nn.Module,
    loss: Callable[[], Tensor],
    run: Callable[[Callable[[], Tensor]], Any] | None = None,
) -> str | None:
    """Take a step, and say where it leaves the method's formula, or None.

    `run(closure)` takes it, or several steps of MeZO-SVRG from an anchor on; it is `optimizer.step` if not given.
    """
    windows = Windows(optimizer, model)
    theta, seen, losses = windows.read(), list[Tensor](), list[float]()

    def closure() -> Tensor:
        value, at = windows.watched(loss)
        seen.append(at)
        losses.append(value.item())
        return value

    try:
        if windows.first == 0:  # later the weights differ from those that the thresholds were taken from
            _check_thresholds(windows)
        (run or optimizer.step)(closure)
        # Compare after the step, since an optimizer may watch every operation in it.
        svrg, n = isinstance(optimizer, zo.MeZOSVRG), optimizer.directions
        calls = n + 1 if _one_sided(windows) else 2 * n
        if svrg:
            calls = 4 * (optimizer.step_count - windows.first) - 2
        if len(losses) != calls:
            raise Wrong(f"expected {calls} closure calls, got {len(losses)}")
        there, here = (losses[1:], losses[:1] * n) if _one_sided(windows) else (losses[::2], losses[1::2])
        gradients = [] if svrg else [_gradient(windows, *pair) for pair in zip(there, here, strict=True)]
        expected = _svrg(windows, theta, losses) if svrg else spsa(windows, theta, gradients)
        limit = _TOLERANCE[windows.dtype] * (theta.abs() + _MOST_Z * _group(windows)["eps"]) if svrg else 0.0
        whens = (*(f"at closure call {call}" for call in range(1, calls + 1)), "after the step")
        for when, got, wanted in zip(whens, (*seen, windows.read()), expected, strict=True):
            if off := windows.off(got, wanted, limit):
                raise Wrong(f"{when} {off}")
    except Wrong as error:
        return str(error)
    return None


def _group(windows: Windows) -> dict[str, Any]:
    (group,) = windows.optimizer.param_groups
    return group


def _gradient(windows: Windows, there: float, here: float) -> float:
    """g from the losses at θ + ε z and at θ - ε z, or at θ if it is one-sided."""
    eps = _group(windows)["eps"]
    return (there - here) / (eps if _one_sided(windows) else 2 * eps)


def _one_sided(windows: Windows) -> bool:
    return windows.optimizer.estimator == "one_sided"


def spsa(windows: Windows, theta: Tensor, gradients: Sequence[float]) -> list[Tensor]:
    """The weights at every loss of a step, and at its end, θ - lr / (n D) m sum_k g_k z_k, rounded as the step does.

    Losses are at θ + ε m z_k and θ - ε m z_k of each direction k; one-sided, at θ and then at each θ + ε m z_k. A step
    in place makes each of these from the one before, by one pass over the directions that the two differ in.
    """
    opt, group, dtype, n = windows.optimizer, _group(windows), windows.dtype, len(gradients)
    zs, kept = [windows.drawn(noise, 0, k) for k in range(n)], _taking_part(windows, theta)
    stochastic = dtype != torch.float32 and opt.rounding != "nearest"

    def moved(w: Tensor, scales: Mapping[int, float]) -> Tensor:
        if not scales:
            return w
        t = w.float()
        for k, scale in scales.items():
            t = fma(zs[k], scale, t)
        rounded = t.to(dtype)
        if stochastic:
            rounded = round_stochastic(t, windows.drawn(rounding_bits, 0, next(iter(scales))), dtype)
        return torch.where(kept, rounded.double(), w)

    eps = group["eps"]
    offsets = [dict[int, float]()] if _one_sided(windows) else []
    offsets += [{k: x} for k in range(n) for x in ((eps,) if _one_sided(windows) else (eps, -eps))]
    offsets += [{k: -group["lr"] * g / n for k, g in enumerate(_normalized(windows, gradients))}]
    if opt.perturb != "in_place":
        return [moved(theta, offset) for offset in offsets]
    points, at, where = [], theta, dict[int, float]()
    for offset in offsets:
        at = moved(
            at, {k: offset.get(k, 0.0) - where.get(k, 0.0) for k in (*where, *(k for k in offset if k not in where))}
        )
        points.append(at)
        where = offset
    return points


def _normalized(windows: Windows, gradients: Sequence[float]) -> list[float]:
    """g_k / D, and 0 where D is 0.

    "std": D² = sum_k (g_k - mean g)² / (n - 1). "rms": D = √(v / w) + δ, where v <- β v + (1 - β) mean_k g_k² and
    w <- β w + (1 - β).
    """
    n, kind = len(gradients), windows.optimizer.normalize
    if kind == "std":
        shifted = [g - gradients[0] for g in gradients]  # which changes D by its rounding alone
        mean = _sum(shifted) / n
        d = math.sqrt(_sum([(g - mean) * (g - mean) for g in shifted]) / (n - 1))
    elif kind == "rms":
        beta, delta, v, w = windows.rms
        v = beta * v + (1.0 - beta) * (_sum([g * g for g in gradients]) / n)
        d = math.sqrt(v / (beta * w + (1.0 - beta))) + delta
    else:
        d = 1.0
    return [g / d if d > 0.0 else 0.0 for g in gradients]


def _sum(values: Sequence[float]) -> float:
    """Add by halves, the order that a step has on any device: four as (a + c) + (b + d), five as that + e."""
    while len(values) > 1:
        half = len(values) // 2
        values = [*map(add, values[:half], values[half : 2 * half]), *values[2 * half :]]
    return values[0]


def _svrg(windows: Windows, theta: Tensor, losses: list[float]) -> list[Tensor]:
    """A full-batch step at the anchor θ̄ = θ, and steps along estimate(θ) - estimate(θ̄) + g."""
    group, given, points = _group(windows), iter(losses), list[Tensor]()

    def estimate(at: Tensor, z: Tensor) -> Tensor:
        points.extend((at + group["eps"] * z, at - group["eps"] * z))
        return _gradient(windows, next(given), next(given)) * z

    anchor, anchor_lr = theta, 2 * group["lr"] if group["anchor_lr"] is None else group["anchor_lr"]
    full = estimate(anchor, windows.drawn(noise, 0, ANCHOR_SLOT).double())
    theta = anchor - anchor_lr * full
    for step in range(1, (len(losses) + 2) // 4):
        z = windows.drawn(noise, step).double()
        other = z if windows.optimizer.shared_direction else windows.drawn(noise, step, SEPARATE_SLOT).double()
        theta = theta - group["lr"] * (estimate(theta, z) - estimate(anchor, other) + full)
    return [*points, theta]


def _taking_part(windows: Windows, theta: Tensor) -> Tensor:
    """Which elements a step changes: magnitudes up to the threshold, outside of the blocks that it drops."""
    kept, opt = theta.abs() <= windows.spread(windows.thresholds), windows.optimizer
    if not opt.drop:
        return kept
    blocks = find_blocks(windows.model)
    dropped = dropped_blocks(len(blocks), opt.drop, direction_seed(opt.seed, windows.first, BLOCK_SLOT))
    still = {p for i in dropped for p in blocks[i].parameters()}
    return kept & (windows.spread([float(p in still) for p in windows.params]) == 0)


def _check_thresholds(windows: Windows) -> None:
    """Each must let the right number of weights through; only equal magnitudes excuse one that lets all through."""
    if not (sparsity := _group(windows)["sparsity"]):
        return
    for name, p, h in zip(windows.names, windows.params, windows.thresholds, strict=True):
        n, sizes = p.numel(), p.detach().abs()
        wanted = n - int(sparsity * n)
        at = float(sizes.float().flatten().kthvalue(wanted).values) if h == math.inf else h
        within, below = int((sizes <= at).sum()), int((sizes < at).sum())
        if h < math.inf and not below < wanted <= within:
            raise Wrong(f"{name}: {within} of {n} weights are within the threshold {h}, not {wanted}")
        if h == math.inf and at > 0.0 and within <= 2 * wanted and 2 * (n - within) >= n - wanted:
            raise Wrong(f"{name}: all of it takes part, and {at} would part it well")
