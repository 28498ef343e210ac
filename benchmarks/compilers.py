"""Who compiles a pass, so that its machine code can be counted on a machine without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Protocol

from zo_kernels.backends.types import MaskKind


class Counted(Protocol):
    """As `zo_kernels.backends.triton.static.Static`."""

    @property
    def elements(self) -> int: ...
    @property
    def first(self) -> float: ...
    @property
    def further(self) -> float: ...
    @property
    def outside(self) -> float: ...
    @property
    def first_opcodes(self) -> Mapping[str, int]: ...
    @property
    def further_opcodes(self) -> Mapping[str, int]: ...
    @property
    def outside_opcodes(self) -> Mapping[str, int]: ...
    @property
    def registers(self) -> int: ...


class Compiler(Protocol):
    def unavailable(self) -> str | None:
        """Why it cannot be asked here, or None."""

    def measure(self, arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Counted:
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

    def measure(self, arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Counted:
        from zo_kernels.backends.triton.static import Variant, measure

        return measure(Variant(arch, dtype, mask, stochastic))


class Nvcc:
    """The CUDA C++ kernel; `benchmarks.cuda_static` does the work."""

    _MODULE = "benchmarks.cuda_static"

    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec(self._MODULE) else f"there is no {self._MODULE}"

    def measure(self, arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Counted:
        return importlib.import_module(self._MODULE).measure(arch, dtype, mask, stochastic)


COMPILERS: dict[str, Compiler] = {"triton": Triton(), "nvcc": Nvcc()}
