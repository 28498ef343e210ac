"""What Triton makes of its kernel, for GPUs that need not be here: SASS instructions counted."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_kernels.backends.triton.launch import COUNTERS, options, target

from ..bench.registry import Unavailable
from .machine_code import Static, Variant, counted, disassembled

_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_POINTERS = {
    **dict.fromkeys(("rows", "seeds"), "*i64"),
    **dict.fromkeys(("ids", "first_chunk"), "*i32"),
    **dict.fromkeys(("scales", "decays"), "*fp32"),
}


def unavailable() -> str | None:
    """Why it cannot be asked here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: this process has Triton's interpreter, not its compiler"
    return None


def compile_kernel(variant: Variant) -> Mapping[str, Any]:
    """The kernel as it would be launched: "ptx" (text) and "cubin" (bytes), or for ROCm "amdgcn" and "hsaco".

    Raises:
        Unavailable: this process runs the kernels in Triton's interpreter.
    """
    if target() == "interpreter":
        raise Unavailable("expected compiled kernels, got Triton's interpreter: unset TRITON_INTERPRET")
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zo_kernels.backends.triton.kernels import axpy_kernel

    on_rocm = isinstance(variant.arch, str)
    gpu = GPUTarget("hip", variant.arch, 64) if on_rocm else GPUTarget("cuda", variant.arch, 32)
    constants = {
        "DISTRIBUTION": variant.distribution,
        "DTYPE": getattr(tl, _TYPES[variant.dtype]),
        "MASK": int(variant.mask),
        "STOCHASTIC": variant.stochastic and variant.dtype != "fp32",
        "DECAY": variant.decay,
        "IN_PLACE": variant.in_place,
        "ALIGNED": variant.aligned,
        "COUNTERS": COUNTERS,
        "THREADS": gpu.warp_size * variant.tuning.warps,
        "TARGET": "hip" if on_rocm else "cuda",
        "PREFETCH": variant.tuning.prefetch,
    }
    types = _POINTERS | {p.name: p.annotation_type for p in axpy_kernel.params if p.annotation_type}
    signature = {name: types.get(name, "constexpr") for name in axpy_kernel.arg_names}
    source = ASTSource(axpy_kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=gpu, options=options(variant.tuning)).asm


def measure(variant: Variant) -> Static:
    """Compile a variant for a compute capability and count its instructions.

    Raises:
        Unavailable: this process runs the kernels in Triton's interpreter.
    """
    asm = compile_kernel(variant)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        [kernel] = disassembled(cubin).values()
    float_operations = sorted(set(re.findall(r"\b[a-z]+\.(?:[\w]+\.)*f32\b", asm["ptx"])))
    elements = 4 * COUNTERS // (32 * variant.tuning.warps)  # a thread and block
    return counted(kernel, elements, float_operations)
