"""What nvcc makes of the CUDA kernel, for GPUs that need not be here: SASS instructions counted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zo_kernels.backends.gpu_table import BLOCK
from zo_kernels.backends.types import MaskKind

from .machine_code import Static, counted
from .sass import kernels

SOURCES = Path(__file__).parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # setup.py's
ELEMENTS = BLOCK // 128  # a thread and block
_DTYPES = ("fp32", "bf16", "fp16")  # csrc/axpy.h: DType

Variant = tuple[str, MaskKind, bool, bool]  # dtype, mask, stochastic, decay


def nvcc() -> str | None:
    """Where it is."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def measure(arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Static:
    """The kernel of a pass without decay, for sm_<arch>.

    Raises:
        RuntimeError: nvcc or nvdisasm is missing, or does not compile it.
    """
    [static] = measure_all(arch, [(dtype, mask, stochastic, False)])
    return static


def measure_all(arch: int, variants: Sequence[Variant]) -> list[Static]:
    """As `measure`, of several variants compiled together; a RuntimeError also if one of them spills registers."""
    codes = [(_DTYPES.index(dtype), int(mask), stochastic, decay) for dtype, mask, stochastic, decay in variants]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text('#include "cuda/kernel.h"\n' + "".join(map(_instance, codes)))
        compiler = nvcc()
        if compiler is None:
            raise RuntimeError("nvcc: expected it on the PATH or in $CUDA_HOME/bin, found none")
        command = [compiler, *FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", f"-I{SOURCES}"]
        report = _run(*command, str(source), "-o", str(cubin))
        found = dict(kernels(_run(_disassembler(compiler), "-c", str(cubin))))
    return [counted(found[name := _mangled(code)], ELEMENTS, _registers(report, name)) for code in codes]


def _instance(code: tuple[int, int, bool, bool]) -> str:
    dtype, mask, stochastic, decay = code
    arguments = f"zo::DType({dtype}), zo::MaskKind({mask}), {stochastic:d}, {decay:d}"
    return f"template __global__ void zo::axpy_kernel<{arguments}>(zo::Work, zo::Coefficients);\n"


def _mangled(code: tuple[int, int, bool, bool]) -> str:
    dtype, mask, stochastic, decay = code
    arguments = f"LNS_5DTypeE{dtype}ELNS_8MaskKindE{mask}ELb{stochastic:d}ELb{decay:d}E"
    return f"_ZN2zo11axpy_kernelI{arguments}EEvNS_4WorkENS_12CoefficientsE"


def _disassembler(compiler: str) -> str:
    beside = shutil.which("nvdisasm", path=str(Path(compiler).parent)) or shutil.which("nvdisasm")
    if beside:
        return beside
    try:
        from triton import knobs
    except ImportError:
        raise RuntimeError("nvdisasm: expected it beside nvcc, on the PATH or in triton, found none") from None
    return knobs.nvidia.nvdisasm.path


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr}")
    return done.stdout + done.stderr


def _registers(report: str, name: str) -> int:
    of_kernel = report[report.index(f"'{name}'") :]
    frame, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", of_kernel)[:3])
    if frame or stores or loads:
        raise RuntimeError(f"{name}: expected all in registers, {frame} bytes of stack and {stores} of spills")
    return int(re.findall(r"Used (\d+) registers", of_kernel)[0])
