"""What MeZO-SVRG is tried on: least squares, and a small classifier of handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import zo_kernels as zo
from zo_kernels.names import param_ids
from zo_kernels.spec import direction_seed

BATCH = 32
_HIDDEN = 16
_DIGITS = 512  # the size of the training sets of the paper's language-model runs
_NEAR = 0.03  # from the optimum, each weight: a tenth of the loss there is excess


@dataclass(eq=False)
class Problem:
    """A training set and a model.

    Args:
        x: (n, features); losses are told in its dtype; the model's is float32.
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

    def __post_init__(self) -> None:
        self._template = self.make().to(self.x)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self._template.named_parameters()}

    @property
    def dimension(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    @cached_property
    def _single(self) -> tuple[Tensor, Tensor]:
        return self.x.float(), self.y.float() if self.y.is_floating_point() else self.y

    def model(self, seed: int) -> nn.Module:
        """In float32, with the weights that a run of this seed starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            if self.near is not None:
                put(model, self.near + _NEAR * torch.randn(self.dimension, dtype=torch.float64))
        return model.to(self.x.device)

    def batch(self, seed: int, step: int) -> Tensor:
        """Indices of a run's minibatch, drawn without replacement and anew in every step."""
        generator = torch.Generator().manual_seed(2**20 * seed + step)
        return torch.randperm(len(self.x), generator=generator)[:BATCH].to(self.x.device)

    def z(self, seed: int, step: int, slot: int) -> Tensor:
        """The direction that an optimizer with this seed draws, (dimension,) in the dtype of x."""
        chosen, ids, where = direction_seed(seed, step, slot), param_ids(self.shapes), self.x.device
        drawn = (zo.noise(s, seed=chosen, param_id=ids[n], device=where).flatten() for n, s in self.shapes.items())
        return torch.cat(list(drawn)).to(self.x.dtype)

    def loss(self, model: nn.Module, index: Tensor | slice) -> Tensor:
        """Mean over the examples of the index."""
        x, y = self._single
        return self.measure(model(x[index]), y[index]).mean()

    def excess(self, model: nn.Module) -> float:
        """The loss on the whole training set above the floor, in the precision of x."""
        return self._loss_at(flat(model).to(self.x), self.x, self.y).item() - self.floor

    def example_gradients(self, theta: Tensor) -> Tensor:
        """∇ of each example's loss at θ (dimension,) by autograd, float64 (n, dimension)."""
        x, y = (t.double() if t.is_floating_point() else t for t in (self.x, self.y))
        return vmap(grad(self._loss_at), in_dims=(None, 0, 0))(theta.double(), x.unsqueeze(1), y.unsqueeze(1))

    def _loss_at(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(self.shapes.items(), theta.split([s.numel() for s in self.shapes.values()]), strict=True)
        weights = {name: part.view(shape) for (name, shape), part in parts}
        return self.measure(functional_call(self._template, weights, (x,)), y).mean()


def flat(model: nn.Module) -> Tensor:
    """The weights, float64 (dimension,)."""
    return parameters_to_vector(model.parameters()).detach().double()


@torch.no_grad()
def put(model: nn.Module, theta: Tensor) -> None:
    """Give the model flat weights, in the memory that it has."""
    for p, part in zip(model.parameters(), theta.split([p.numel() for p in model.parameters()]), strict=True):
        p.copy_(part.view_as(p))


def least_squares(device: str, label_noise: float = 1e-3, near: bool = False, n: int = 1000, d: int = 100) -> Problem:
    """y = Xw + noise with standard normal X and w. The published script has this n, d and label noise.

    Args:
        near: start near the optimum, where the noise of minibatches outweighs the gradient.
    """
    generator = torch.Generator().manual_seed(0)
    x, w, noise = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((n, d), (d, 1), (n, 1)))
    y = x @ w + label_noise * noise
    best = torch.linalg.lstsq(x, y).solution
    return Problem(
        x.to(device),
        y.to(device),
        lambda: nn.Sequential(nn.Linear(d, 1, bias=False)),
        lambda outputs, targets: (outputs - targets).square().mean(-1),
        floor=(x @ best - y).square().mean().item(),
        near=best.flatten() if near else None,
    )


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
