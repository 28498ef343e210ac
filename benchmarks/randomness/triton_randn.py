"""Values of `tl.randn`: by a kernel on a GPU, and on a CPU by Triton's interpreter in a process of its own.

The interpreter is chosen when Triton is imported, which this process may have done already.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = {"cpu": 2**20, "cuda": 2**10}  # the interpreter spreads what a call costs over a million values


@cache
def on(device: str) -> Callable[[int, int, int], Tensor]:
    """A function of (seed, offset, count) that gives float32 [count] on the device."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, seed, offset, count, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + index, tl.randn(seed, offset + index), mask=index < count)

    def fill(seed: int, offset: int, count: int) -> Tensor:
        out = torch.empty(count, device=device)
        width = min(_BLOCK[torch.device(device).type], triton.next_power_of_2(count))
        kernel[(triton.cdiv(count, width),)](out, seed, offset, count, BLOCK=width)
        return out

    return fill


def _interpret(seed: int, offset: int, count: int) -> NDArray[np.float32]:
    """Runs in the other process."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    return on("cpu")(seed, offset, count).numpy()


def interpreted() -> Callable[[int, int, int], Tensor]:
    """The same function on a CPU; its process ends with it."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    return lambda *of: torch.from_numpy(pool.submit(_interpret, *of).result())
