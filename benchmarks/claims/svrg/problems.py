"""What MeZO-SVRG is tried on: least squares, and a small classifier of handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

BATCH = 32
_HIDDEN = 16
_DIGITS = 512  # the size of the training sets of the paper's language-model runs
_DATA_SEED = 0
_SPREAD = 0.03  # of a start near the optimum: a tenth of the loss there is excess


@dataclass(frozen=True)
class Problem:
    """A training set and a model.

    Args:
        x: (n, features); formulas are computed in its dtype.
        y: (n, 1) targets, or (n,) labels.
        make: the module, with any weights.
        measure: (outputs, targets) -> the loss of each example.
        floor: the lowest loss that any weights reach; 0 where that is not known.
        near: weights (dimension,) in whose neighbourhood runs start; None for the module's own initialisation.
    """

    x: Tensor
    y: Tensor
    make: Callable[[], nn.Module]
    measure: Callable[[Tensor, Tensor], Tensor]
    floor: float = 0.0
    near: Tensor | None = None

    @property
    def examples(self) -> int:
        return len(self.x)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.make().named_parameters()}

    @cached_property
    def _single(self) -> tuple[Tensor, Tensor]:
        """As the model, which is in float32, takes them."""
        return self.x.float(), self.y if self.y.dtype == torch.int64 else self.y.float()

    @property
    def dimension(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def model(self, seed: int) -> nn.Module:
        """In float32, with the weights that a run of this seed starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            if self.near is not None:
                put(model, self.near + _SPREAD * torch.randn(self.dimension, dtype=torch.float64))
        return model.to(self.x.device)

    def loss(self, model: nn.Module, index: Tensor | None = None) -> Tensor:
        """Mean over the examples of the index, over all without one."""
        x, y = self._single
        if index is not None:
            x, y = x[index], y[index]
        return self.measure(model(x), y).mean()

    def losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Of many weights at once, each on a batch of its own.

        Args:
            theta: (..., dimension).
            x, y: (..., examples, features), (..., examples, 1) or (..., examples); leading sizes of 1 are shared.

        Returns:
            (...).
        """
        parts = theta.split([shape.numel() for shape in self.shapes.values()], -1)
        weights = [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]
        h = x @ weights[0].mT
        for bias, weight in zip(weights[1::2], weights[2::2], strict=False):
            h = (h + bias.unsqueeze(-2)).relu() @ weight.mT
        if len(weights) == 1:
            return (h - y).square().mean((-2, -1))
        h = h + weights[-1].unsqueeze(-2)
        chosen = h.gather(-1, y.expand(h.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return (h.logsumexp(-1) - chosen).mean(-1)

    def example_gradients(self, model: nn.Module) -> Tensor:
        """∇ of each example's loss at the model's weights by autograd, float64 (n, dimension)."""
        weights = {name: p.detach().double() for name, p in model.named_parameters()}

        def one(w: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.measure(functional_call(model, dict(w), (x.unsqueeze(0),)), y.unsqueeze(0)).mean()

        found = vmap(grad(one), in_dims=(None, 0, 0))(weights, self.x.double(), self.y)
        return torch.cat([g.flatten(1) for g in found.values()], 1)


def flat(model: nn.Module) -> Tensor:
    """The weights, float64 (dimension,)."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@torch.no_grad()
def put(model: nn.Module, theta: Tensor) -> None:
    """Give the model flat weights."""
    parts = theta.split([p.numel() for p in model.parameters()])
    for p, part in zip(model.parameters(), parts, strict=True):
        p.copy_(part.view_as(p))


def least_squares(device: str, label_noise: float = 1e-3, near: bool = False, n: int = 1000, d: int = 100) -> Problem:
    """y = Xw + noise with standard normal X and w. The published script has this n, d and label noise.

    Args:
        near: start near the optimum, which is where noise of minibatches outweighs the gradient.
    """
    generator = torch.Generator().manual_seed(_DATA_SEED)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    w = torch.randn(d, 1, dtype=torch.float64, generator=generator)
    y = x @ w + label_noise * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    best = torch.linalg.lstsq(x, y).solution
    floor = (x @ best - y).square().mean().item()
    return Problem(
        x.to(device),
        y.to(device),
        lambda: nn.Sequential(nn.Linear(d, 1, bias=False)),
        _squared,
        floor,
        best.flatten() if near else None,
    )


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)


def digits(device: str) -> Problem:
    """The first handwritten digits, 8 by 8 pixels, of scikit-learn's copy of the UCI set; one hidden layer."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Problem(
        (torch.from_numpy(images[:_DIGITS]) / 16.0).float().to(device),
        torch.from_numpy(labels[:_DIGITS]).long().to(device),
        lambda: nn.Sequential(nn.Linear(64, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10)),
        lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"),
    )
