"""What Triton makes of its kernel, for GPUs that need not be here: SASS instructions counted."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zo_kernels.backends.triton.launch import COUNTERS, options, target
from zo_kernels.backends.tuning import DEFAULT, Tuning
from zo_kernels.backends.types import MaskKind

from .machine_code import Static, counted
from .sass import kernels

_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of the kernel for one compute capability (80 for 8.0), or one of AMD's architectures."""

    arch: int | str
    dtype: str
    mask: MaskKind = MaskKind.NONE
    stochastic: bool = False
    aligned: bool = True
    decay: bool = False
    in_place: bool = True
    tuning: Tuning = DEFAULT

    @property
    def elements(self) -> int:
        """A thread and block."""
        return 4 * COUNTERS // (32 * self.tuning.warps)

    @property
    def on_rocm(self) -> bool:
        return isinstance(self.arch, str)


def compile_kernel(variant: Variant) -> Mapping[str, Any]:
    """The kernel as it would be launched: "ptx" (text) and "cubin" (bytes), or for ROCm "amdgcn" and "hsaco".

    Raises:
        RuntimeError: this process runs the kernels in Triton's interpreter.
    """
    if target() == "interpreter":
        raise RuntimeError("expected compiled kernels, got Triton's interpreter: unset TRITON_INTERPRET")
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zo_kernels.backends.triton.kernels import axpy_kernel

    constants = {
        "DTYPE": getattr(tl, _TYPES[variant.dtype]),
        "MASK": int(variant.mask),
        "STOCHASTIC": variant.stochastic and variant.dtype != "fp32",
        "DECAY": variant.decay,
        "IN_PLACE": variant.in_place,
        "ALIGNED": variant.aligned,
        "COUNTERS": COUNTERS,
        "TARGET": "hip" if variant.on_rocm else "cuda",
        "PREFETCH": variant.tuning.prefetch,
    }
    types = {
        "rows": "*i64",
        "ids": "*i32",
        "first_chunk": "*i32",
        "seeds": "*i64",
        "scales": "*fp32",
        "decays": "*fp32",
    }
    types |= {p.name: p.annotation_type for p in axpy_kernel.params if p.annotation_type}
    signature = {name: types.get(name, "constexpr") for name in axpy_kernel.arg_names}
    source = ASTSource(axpy_kernel, signature=signature, constexprs=constants)
    gpu = GPUTarget("hip", variant.arch, 64) if variant.on_rocm else GPUTarget("cuda", variant.arch, 32)
    return triton.compile(source, target=gpu, options=options(variant.tuning)).asm


def measure(variant: Variant) -> Static:
    """Compile a variant for a compute capability and count its instructions.

    Raises:
        RuntimeError: this process runs the kernels in Triton's interpreter.
    """
    asm = compile_kernel(variant)
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        [(_, kernel)] = kernels(_run(knobs.nvidia.nvdisasm.path, "-c", file.name))
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG:, got {usage!r}")
    float_operations = sorted(set(re.findall(r"\b[a-z]+\.(?:[\w]+\.)*f32\b", asm["ptx"])))
    return counted(kernel, variant.elements, int(registers[1]), float_operations)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
