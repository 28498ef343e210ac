"""What nvcc makes of the CUDA kernel, for GPUs that need not be here: SASS instructions counted."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zo_kernels.backends.gpu_table import BLOCK
from zo_kernels.backends.types import MaskKind
from zo_kernels.spec import DISTRIBUTIONS

from ..bench.registry import Unavailable
from .machine_code import Static, Variant, counted, disassembled, run

SOURCES = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # setup.py's
ELEMENTS = BLOCK // 128  # a thread and block
_DTYPES = ("fp32", "bf16", "fp16")  # csrc/axpy.h: DType


def nvcc() -> str | None:
    """Where it is."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def unavailable() -> str | None:
    """Why it cannot be asked here, or None."""
    return None if nvcc() else "there is no nvcc, neither in $CUDA_HOME/bin nor on the PATH"


def measure(variant: Variant) -> Static:
    """The kernel of a pass; a Unavailable as of `measure_all`."""
    kind = (variant.distribution, variant.dtype, variant.mask, variant.stochastic, variant.decay)
    return measure_all(variant.arch, [kind])[0]


def measure_all(arch: int | str, variants: Sequence[tuple[str, str, MaskKind, bool, bool]]) -> list[Static]:
    """The kernels of several variants (distribution, dtype, mask, stochastic, decay), compiled together.

    Raises:
        Unavailable: a tool is missing or fails, or a kernel does not keep all in registers.
    """
    if (compiler := nvcc()) is None:
        raise Unavailable("nvcc: expected it on the PATH or in $CUDA_HOME/bin, found none")
    codes = [
        (DISTRIBUTIONS.index(distribution), _DTYPES.index(dtype), int(mask), int(stochastic), int(decay))
        for distribution, dtype, mask, stochastic, decay in variants
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        source.write_text('#include "cuda/kernel.h"\n' + "".join(map(_instance, codes)))
        run(compiler, *FLAGS, f"-arch=sm_{arch}", "-cubin", f"-I{SOURCES}", str(source), "-o", str(cubin))
        found = disassembled(cubin, compiler)
    kernels = [found[_mangled(code)] for code in codes]
    if spilled := [(v, kernel.stack_bytes) for v, kernel in zip(variants, kernels, strict=True) if kernel.stack_bytes]:
        raise Unavailable(f"nvcc: expected all in registers, got bytes of stack: {spilled}")
    return [counted(kernel, ELEMENTS) for kernel in kernels]


def _instance(code: tuple[int, ...]) -> str:
    arguments = "zo::Distribution({}), zo::DType({}), zo::MaskKind({}), {}, {}".format(*code)
    return f"template __global__ void zo::axpy_kernel<{arguments}>(zo::Work, zo::Coefficients);\n"


def _mangled(code: tuple[int, ...]) -> str:
    arguments = "LNS_12DistributionE{}ELNS_5DTypeE{}ELNS_8MaskKindE{}ELb{}ELb{}E".format(*code)
    return f"_ZN2zo11axpy_kernelI{arguments}EEvNS_4WorkENS_12CoefficientsE"
