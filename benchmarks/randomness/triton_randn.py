"""Values of `tl.randn`: by a kernel on a GPU, and on a CPU by Triton's interpreter, in a process of its own.

The interpreter is chosen by an environment variable when Triton is imported, which this process may have done already.
As a program this module reads lines "seed offset count" and answers each with `count` float32 in native byte order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_BLOCK_ON_GPU = 1024
_BLOCK_INTERPRETED = 2**20  # what a call of the interpreter costs is spread over so many


def _fill(device: str, block: int) -> Callable[[int, int, int], Tensor]:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, seed, offset, count, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + index, tl.randn(seed, offset + index), mask=index < count)

    def fill(seed: int, offset: int, count: int) -> Tensor:
        out = torch.empty(count, device=device)
        width = min(block, triton.next_power_of_2(count))
        kernel[(triton.cdiv(count, width),)](out, seed, offset, count, BLOCK=width)
        return out

    return fill


def on_gpu(device: str) -> Callable[[int, int, int], Tensor]:
    """A function of (seed, offset, count) that gives float32 [count] on the device."""
    return _fill(device, _BLOCK_ON_GPU)


class Interpreted:
    """The same by Triton's interpreter, in a child process that ends with this object."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=environment,
        )

    def fill(self, seed: int, offset: int, count: int) -> Tensor:
        out = torch.empty(count)
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None
        stdin.write(f"{seed} {offset} {count}\n".encode())
        stdin.flush()
        into, have = out.numpy().data.cast("B"), 0
        while have < len(into):
            if not (got := stdout.readinto(into[have:])):  # type: ignore[attr-defined]
                raise RuntimeError(f"Triton's interpreter ended with status {self._child.wait()}")
            have += got
        return out

    def __del__(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.wait()


def _serve() -> None:
    torch.set_num_threads(1)
    fill = _fill("cpu", _BLOCK_INTERPRETED)
    for line in sys.stdin:
        seed, offset, count = map(int, line.split())
        sys.stdout.buffer.write(fill(seed, offset, count).numpy().tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
