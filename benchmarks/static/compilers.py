"""Who compiles a pass, so that its machine code can be counted on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Protocol

from zo_kernels.backends.types import MaskKind

from . import cuda as cuda_static
from . import triton as triton_static
from .machine_code import Static


class Compiler(Protocol):
    def unavailable(self) -> str | None:
        """Why it cannot be asked here, or None."""

    def measure(self, arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Static:
        """Compile a pass and count its instructions.

        Raises:
            RuntimeError: it cannot, and why.
        """


class Triton:
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if os.environ.get("TRITON_INTERPRET", "0") != "0":
            return "TRITON_INTERPRET is set: this process has Triton's interpreter, not its compiler"
        return None

    def measure(self, arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Static:
        return triton_static.measure(triton_static.Variant(arch, dtype, mask, stochastic))


class Nvcc:
    def unavailable(self) -> str | None:
        return None if cuda_static.nvcc() else "there is no nvcc, neither in $CUDA_HOME/bin nor on the PATH"

    def measure(self, arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Static:
        return cuda_static.measure(arch, dtype, mask, stochastic)


COMPILERS: dict[str, Compiler] = {"triton": Triton(), "nvcc": Nvcc()}
