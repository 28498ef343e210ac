"""Who makes normals: noise v1, PyTorch's generator, Triton's. Each as a run of an optimizer would draw them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels import spec
from zo_kernels.names import param_ids

TENSORS = 16  # of a model, each with an id of its own
_CHECKED = 2048  # elements at each end of a tensor
_TORCH_CPU_BITS = 24  # of the uniform whose logarithm torch.randn takes on a CPU
_CURAND_BITS = 33  # its smallest uniform is half of 2**-32
_TRITON_SMALLEST = 1e-7  # tl.randn replaces smaller uniforms by it


class Source(Protocol):
    """A generator of normals on a device."""

    generator: str
    device: str

    def skipped(self) -> str | None:
        """Why it cannot be asked here, or None."""

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        """float32 [count]: the values of a model's tensor in a step; its tensors are asked for in order, from 0."""

    def wrong(self, count: int) -> str | None:
        """What differs from the definition of the values in tensors of `count` elements, or None."""

    def members(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The first and the second members of the Box–Muller pairs of a tensor, or None if only one is used."""

    def largest(self) -> float:
        """The largest value that it can give, from how it makes them."""


@cache
def ids() -> tuple[int, ...]:
    """The ids of a model's tensors."""
    return tuple(param_ids(f"model.layers.{i}.weight" for i in range(TENSORS)).values())


class Ours:
    """noise v1 with the seeds of a run's steps and the ids of a model's parameters."""

    generator = "zo.noise"

    def __init__(self, device: str):
        self.device = device

    def skipped(self) -> str | None:
        return None

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        return zo.noise(count, seed=spec.direction_seed(0, step, 0), param_id=ids()[number], device=self.device)

    def wrong(self, count: int) -> str | None:
        every = torch.arange(count)
        index = torch.cat([every[:_CHECKED], every[_CHECKED:][-_CHECKED:]])
        for step, number in ((0, 0), (1, TENSORS - 1)):
            expected = spec.normal(index, spec.direction_seed(0, step, 0), ids()[number])
            found = self.tensor(step, number, count).cpu()[index]
            if off := int((found.view(torch.int32) != expected.view(torch.int32)).sum()):
                return f"step {step}, tensor {number}: {off} of {len(index)} values are not those of noise v1"
        return None

    def members(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[0::2], x[1::2]

    def largest(self) -> float:
        return spec.radius(torch.zeros(1, dtype=torch.int64)).item()


class Torch:
    """`Tensor.normal_`, reseeded in each step and drawn from in the order of the tensors, as MeZO's code does."""

    generator = "torch.randn"

    def __init__(self, device: str):
        self.device = device
        self._generator = torch.Generator(device)
        self._at: tuple[int, int] | None = None

    def skipped(self) -> str | None:
        return None

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        if number == 0:
            self._generator.manual_seed(step)
        elif self._at != (step, number):
            raise ValueError(f"tensor {number} of step {step} was asked for out of order")
        self._at = step, number + 1
        return torch.empty(count, device=self.device).normal_(generator=self._generator)

    def wrong(self, count: int) -> str | None:
        return None

    def members(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.device != "cpu":
            return None  # which ones are a pair depends on the launch
        sixteen = x[: len(x) // 16 * 16].view(-1, 16)  # on a CPU sixteen uniforms become sixteen normals
        return sixteen[:, :8].flatten(), sixteen[:, 8:].flatten()

    def largest(self) -> float:
        bits = _TORCH_CPU_BITS if self.device == "cpu" else _CURAND_BITS
        return math.sqrt(2 * bits * math.log(2))


class Triton:
    """`tl.randn`, each step with its seed, the tensors one after the other in the offsets."""

    generator = "tl.randn"

    def __init__(self, device: str):
        self.device = device
        self._fill: Callable[[int, int, int], Tensor] | None = None

    def skipped(self) -> str | None:
        return None if importlib.util.find_spec("triton") is not None else "triton is not installed"

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        if self._fill is None:
            from . import triton_randn

            self._fill = triton_randn.Interpreted().fill if self.device == "cpu" else triton_randn.on_gpu(self.device)
        return self._fill(step, number * count, count)

    def wrong(self, count: int) -> str | None:
        return None

    def members(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return None

    def largest(self) -> float:
        return math.sqrt(-2 * math.log(_TRITON_SMALLEST))


SOURCES: dict[str, Callable[[str], Source]] = {"zo.noise": Ours, "torch.randn": Torch, "tl.randn": Triton}
