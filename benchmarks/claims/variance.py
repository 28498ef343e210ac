"""The variance of the estimate along normals and along random signs, measured against theory.

One direction estimates the gradient of a loss f of d weights by ĝ = (f(θ + εz) - f(θ - εz)) / 2ε · z. By Taylor,

    ĝ = (∇f·z + ε²/6 D³f[z, z, z] + O(ε⁴)) z

so as ε → 0, or at any ε where f has no third derivatives (a quadratic), E ĝ = ∇f and E∥ĝ∥² = E (∇f·z)² ∥z∥². With
independent zᵢ, E zᵢ = 0 and E zᵢ² = 1, that is Σᵢ ∂ᵢf² (E zᵢ⁴ + d - 1). A normal's E zᵢ⁴ is 3, a sign's 1. Hence

    normals   E∥ĝ∥² = (d + 2) ∥∇f∥²    E∥ĝ - ∇f∥² = (d + 1) ∥∇f∥²
    signs     E∥ĝ∥² = d ∥∇f∥²          E∥ĝ - ∇f∥² = (d - 1) ∥∇f∥²      (∥z∥² is d)

Of the terms of ε², with Δ the sum of the second derivatives: E ĝ is off by ε²/2 ∇Δf for normals and by
ε²/2 ∇Δf - ε²/3 ∂ᵢ³f for signs, since E zᵢ⁴ counts once for each i; E∥ĝ∥² by ε² (d + 4) ∇f·∇Δf and by
ε² d (∇f·∇Δf - ⅔ Σᵢ ∂ᵢf ∂ᵢ³f). They are left out of the theory, and show where they matter.

The gradients are autograd's, the estimates those of the library's steps, which change nothing (lr = 0).
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import FIRST_SLOT
from zo_kernels.names import param_ids
from zo_kernels.spec import direction_seed

from ..bench.options import DISTRIBUTIONS
from ..bench.registry import Case, Row, Wrong
from ..step.exact import wrong_step
from .intervals import mean, over_seeds, ratio
from .learning import Task
from .tasks import LANGUAGE, studies

CLAIM = "rademacher-variance"
EXTRA = {"normal": 1, "rademacher": -1}  # of the variance: d + 1 and d - 1, in units of ∥∇f∥²
_DIMENSIONS = (2, 8, 64)
_DRAWS, _DRAWS_OF_WHOLE, _FAST = 2000, 200, 20  # for each seed
_EPS = 1e-3
_MOST_ERRORS = 5.0  # standard errors that a mean may be off,
_MOST_OFF = 0.01  # or this part of the variance: of two weights signs have the same ∥ĝ - ∇f∥² in every draw


class Quadratic(nn.Module):
    """½ θᵀAθ + bᵀθ, computed in float64, with a random A and b for each seed."""

    def __init__(self, dimension: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        factor, self.b = torch.randn(dimension + 1, dimension, dtype=torch.float64, generator=generator).split(
            (dimension, 1)
        )
        self.A = factor @ factor.T / dimension
        self.theta = nn.Parameter(torch.randn(dimension, generator=generator))

    def forward(self) -> Tensor:
        theta = self.theta.double()
        return theta @ self.A @ theta / 2 + (self.b @ theta).sum()


@dataclass(frozen=True)
class Problem:
    """A model whose trained weights are those that require grad, and a loss of it that is always the same."""

    model: nn.Module
    loss: Callable[[], Tensor]


def quadratic(dimension: int, seed: int) -> Problem:
    model = Quadratic(dimension, seed)
    return Problem(model, model)


def language(task: Callable[[], Task], trained: str, seed: int) -> Problem:
    """A pretrained language model on one batch of a new text; the weights whose names begin so take part."""
    model = task().model(seed)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trained))
    return Problem(model, next(task().closures(model, seed)))


def cases(options: Namespace) -> Iterator[Case]:
    name = LANGUAGE[0]
    study = studies(options)[name]
    places: dict[str, tuple[Callable[[int], Problem], int]] = {
        f"quadratic/{d}": (partial(quadratic, d), _DRAWS) for d in _DIMENSIONS
    }
    for part, trained, draws in (("last-bias", "norm.bias", _DRAWS), ("whole", "", _DRAWS_OF_WHOLE)):
        places[f"{name}/{part}"] = partial(language, lambda: study.task, trained), draws
    for place, (make, draws) in places.items():
        facts = {"claim": CLAIM, "experiment": "variance", "place": place, "dtype": "float32"}
        measure = partial(_measured, make, options.steps or (_FAST if options.fast else draws), options)
        yield Case(f"{CLAIM}/{place}", facts, measure, study.skipped if name in place else None)


def _measured(make: Callable[[int], Problem], draws: int, options: Namespace) -> list[Row]:
    """Rows of the seeds and their means for both distributions, signs against normals in the last one."""
    torch.set_num_threads(options.threads)
    rows, variances = list[Row](), dict[str, list[float]]()
    for distribution in DISTRIBUTIONS:
        found = [_of_seed(make(seed), seed, draws, distribution, options.backend) for seed in options.seeds]
        variances[distribution] = [row["variance"] for row in found]
        known = {"correct": True, "distribution": distribution, "draws": draws}
        known |= {key: found[0].pop(key) for key in ("elements", "expected")}
        rows += over_seeds(known, options.seeds, [{k: v for k, v in row.items() if k not in known} for row in found])
        rows[-1] |= mean(variances[distribution], "variance")
        off = fmean(variances[distribution]) - known["expected"]
        error = math.hypot(*(row["standard_error"] for row in found)) / len(found)
        if not abs(off) <= max(_MOST_ERRORS * error, _MOST_OFF * known["expected"]):
            raise Wrong(f"{distribution}: the variance is off by {off:.3g}, with a standard error of {error:.2g}")
        rows[-1] |= {"standard_error": error}
    rows[-1] |= ratio(variances["rademacher"], variances["normal"], "to_normal")
    return rows


def _of_seed(problem: Problem, seed: int, draws: int, distribution: str, backend: str | None) -> Row:
    """The variance and the mean square of so many estimates in units of ∥∇f∥², and what is expected."""
    options = {"lr": 0.0, "eps": _EPS, "perturb": "in_forward", "parallel": "off", "backend": backend}
    optimizer = zo.MeZO(problem.model, seed=seed, distribution=distribution, **options)
    if wrong := wrong_step(optimizer, problem.model, problem.loss):
        raise Wrong(wrong)
    trained = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        gradients = torch.autograd.grad(problem.loss(), list(trained.values()))
    gradient = torch.cat([g.flatten().double() for g in gradients])
    names = param_ids(name for name, _ in problem.model.named_parameters())
    ids = [names[name] for name in trained]
    squares, sizes = [], []
    for _ in range(draws):
        direction = direction_seed(seed, optimizer.step_count, FIRST_SLOT)
        optimizer.step(problem.loss)
        (g,) = optimizer.projected_gradients
        z = [
            zo.noise(p.numel(), seed=direction, param_id=i, distribution=distribution, backend=backend)
            for p, i in zip(trained.values(), ids, strict=True)
        ]
        estimate = g * torch.cat(z).double()
        squares.append((estimate - gradient).square().sum())
        sizes.append(estimate.square().sum())
    found, unit = torch.stack(squares) / gradient.square().sum(), gradient.square().sum()
    return {
        "elements": len(gradient),
        "variance": found.mean().item(),
        "standard_error": (found.std() / draws**0.5).item(),
        "mean_square": (torch.stack(sizes) / unit).mean().item(),
        "expected": float(len(gradient) + EXTRA[distribution]),
    }
