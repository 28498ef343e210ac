"""Generators: noise v1 (normals and signs), PyTorch's and Triton's normals, each drawn from as a run would."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, cached_property
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
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
    """A generator on a CPU.

    Attributes:
        generator: its name.
        largest: the largest value that it can give, from how it makes them.
        ours: whether it is noise v1, whose values are compared with their definition.
    """

    generator: str
    largest: float
    ours = False

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
        """The first and the second members of a tensor's Box–Muller pairs; None if it has but one of each."""
        return None


class Ours(Source):
    """Noise v1 with the seeds of a run's steps and the ids of a model's parameters."""

    generator = "zo.noise"
    largest = spec.radius(torch.zeros(1, dtype=torch.int64)).item()
    ours = True
    distribution = "normal"

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        return self.drawn(count, spec.direction_seed(0, step, 0), ids()[number])

    def drawn(self, count: int, seed: int, param_id: int, offset: int = 0) -> Tensor:
        """float32 [count]: the values of any seed and id, from an index on."""
        return zo.noise(count, seed=seed, param_id=param_id, offset=offset, distribution=self.distribution)

    def wrong(self) -> str | None:
        index = torch.cat([torch.arange(_CHECKED), torch.arange(PER_TENSOR - _CHECKED, PER_TENSOR)])
        for step, number in ((0, 0), (1, TENSORS - 1)):
            expected = spec.noise(index, spec.direction_seed(0, step, 0), ids()[number], self.distribution)
            found = self.tensor(step, number, PER_TENSOR)[index]
            if off := int((found.view(torch.int32) != expected.view(torch.int32)).sum()):
                return f"step {step}, tensor {number}: {off} of {len(index)} values are not those of noise v1"
        return None

    def members(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[0::2], x[1::2]


class Signs(Ours):
    """Noise v1's random signs; members of a pair are elements whose bits have one place in the halves of a word."""

    generator = "zo.noise signs"
    largest = 1.0
    distribution = "rademacher"


class Torch(Source):
    """`Tensor.normal_`, seeded in each step and drawn from in the order of the tensors, as MeZO's code does."""

    generator = "torch.randn"
    largest = math.sqrt(2 * 24 * math.log(2))  # it takes the logarithm of a uniform of 24 bits

    def __init__(self) -> None:
        self._generator = torch.Generator()
        self._next: tuple[int, int] | None = None

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        if number == 0:
            self._generator.manual_seed(step)
        elif self._next != (step, number):
            raise ValueError(f"expected the tensors of a step in order, got tensor {number} of step {step}")
        self._next = step, number + 1
        return torch.empty(count).normal_(generator=self._generator)

    def members(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sixteen = x[: len(x) // 16 * 16].view(-1, 16)  # sixteen uniforms become sixteen normals
        return sixteen[:, :8].flatten(), sixteen[:, 8:].flatten()


class Triton(Source):
    """`tl.randn` in Triton's interpreter, each step with its seed, the tensors one after the other in the offsets."""

    generator = "tl.randn"
    largest = math.sqrt(-2 * math.log(1e-7))  # it replaces smaller uniforms by 1e-7

    def skipped(self) -> str | None:
        return None if importlib.util.find_spec("triton") is not None else "triton is not installed"

    @cached_property
    def _process(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def tensor(self, step: int, number: int, count: int) -> Tensor:
        return torch.from_numpy(self._process.submit(interpreted, step, number * count, count).result())


def interpreted(seed: int, offset: int, count: int) -> NDArray[np.float32]:
    """Values of `tl.randn`, in a process of its own: the interpreter is chosen when Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, seed, offset, count, BLOCK: tl.constexpr):
        index = tl.arange(0, BLOCK)
        tl.store(out + index, tl.randn(seed, offset + index), mask=index < count)

    out = torch.empty(count)
    kernel[(1,)](out, seed, offset, count, BLOCK=triton.next_power_of_2(count))
    return out.numpy()


SOURCES: dict[str, Callable[[], Source]] = {
    "zo.noise": Ours,
    "zo.noise signs": Signs,
    "torch.randn": Torch,
    "tl.randn": Triton,
}


def tensors(source: Source, values: int) -> Iterator[Tensor]:
    """So many values in tensors of a model, step after step."""
    for at in range(0, values, PER_TENSOR):
        step, number = divmod(at // PER_TENSOR, TENSORS)
        yield source.tensor(step, number, PER_TENSOR)[: values - at]
