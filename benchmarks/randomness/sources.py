"""Generators of normals: noise v1, PyTorch's and Triton's, each drawn from as a run of an optimizer would."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache, cached_property

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels import spec
from zo_kernels.names import param_ids

TENSORS = 16  # of a model, each with an id of its own
PER_TENSOR = 2**17  # values; they and what is made of them stay in a processor's cache
_CHECKED = 2048  # elements at each end of a tensor


@cache
def ids() -> tuple[int, ...]:
    """The ids of a model's tensors."""
    return tuple(param_ids(f"model.layers.{i}.weight" for i in range(TENSORS)).values())


class Source:
    """A generator of normals on a device.

    Attributes:
        generator: its name.
        largest: the largest value that it can give, from how it makes them.
    """

    generator: str
    largest: float

    def __init__(self, device: str):
        self.device = device

    def skipped(self) -> str | None:
        """Why it cannot run here, or None."""
        return None

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        """float32 [count]: the values of a model's tensor in a step. Ask for a step's tensors in order, from 0."""
        raise NotImplementedError

    def wrong(self) -> str | None:
        """How some of the values differ from their definition, or None."""
        return None

    def members(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The first and the second members of a tensor's Box–Muller pairs; None if they are not known."""
        return None


class Ours(Source):
    """Noise v1 with the seeds of a run's steps and the ids of a model's parameters."""

    generator = "zo.noise"
    largest = spec.radius(torch.zeros(1, dtype=torch.int64)).item()

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        return zo.noise(count, seed=spec.direction_seed(0, step, 0), param_id=ids()[number], device=self.device)

    def wrong(self) -> str | None:
        index = torch.cat([torch.arange(_CHECKED), torch.arange(PER_TENSOR - _CHECKED, PER_TENSOR)])
        for step, number in ((0, 0), (1, TENSORS - 1)):
            expected = spec.normal(index, spec.direction_seed(0, step, 0), ids()[number])
            found = self.tensor(step, number, PER_TENSOR).cpu()[index]
            if off := int((found.view(torch.int32) != expected.view(torch.int32)).sum()):
                return f"step {step}, tensor {number}: {off} of {len(index)} values are not those of noise v1"
        return None

    def members(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[0::2], x[1::2]


class Torch(Source):
    """`Tensor.normal_`, seeded in each step and drawn from in the order of the tensors, as MeZO's code does."""

    generator = "torch.randn"

    def __init__(self, device: str):
        super().__init__(device)
        bits = 24 if device == "cpu" else 33  # of the uniform whose logarithm is taken; cuRAND's smallest is 2^-33
        self.largest = math.sqrt(2 * bits * math.log(2))
        self._generator = torch.Generator(device)
        self._next: tuple[int, int] | None = None

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        if number == 0:
            self._generator.manual_seed(step)
        elif self._next != (step, number):
            raise ValueError(f"expected the tensors of a step in order, got tensor {number} of step {step}")
        self._next = step, number + 1
        return torch.empty(count, device=self.device).normal_(generator=self._generator)

    def members(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.device != "cpu":
            return None  # which ones are a pair depends on the launch
        sixteen = x[: len(x) // 16 * 16].view(-1, 16)  # on a CPU sixteen uniforms become sixteen normals
        return sixteen[:, :8].flatten(), sixteen[:, 8:].flatten()


class Triton(Source):
    """`tl.randn`, each step with its seed, the tensors one after the other in the offsets."""

    generator = "tl.randn"
    largest = math.sqrt(-2 * math.log(1e-7))  # it replaces smaller uniforms by 1e-7

    def skipped(self) -> str | None:
        return None if importlib.util.find_spec("triton") is not None else "triton is not installed"

    @cached_property
    def _fill(self) -> Callable[[int, int, int], Tensor]:
        from . import triton_randn

        return triton_randn.interpreted() if self.device == "cpu" else triton_randn.on(self.device)

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        return self._fill(step, number * count, count)


SOURCES: dict[str, Callable[[str], Source]] = {"zo.noise": Ours, "torch.randn": Torch, "tl.randn": Triton}


def tensors(source: Source, values: int) -> Iterator[Tensor]:
    """So many values in tensors of a model, step after step."""
    for at in range(0, values, PER_TENSOR):
        step, number = divmod(at // PER_TENSOR, TENSORS)
        yield source.tensor(step, number, PER_TENSOR)[: values - at]
