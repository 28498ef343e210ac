"""What the kernel compiles to, for a GPU that need not be here: instructions, wide accesses, spills.

    python -m zo_kernels.backends.triton.static --arch 80 90 --dtype fp32 bf16

prints one JSON object a variant. The numbers are static counts of SASS instructions, in the loops that a program goes
through: over blocks, in it over further directions, and before both the search for its tensor. What stands before the
loop over blocks is spread over the blocks of a whole chunk.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..gpu_table import MOST_BLOCKS
from ..types import MaskKind
from .launch import COUNTERS, OPTIONS, WARPS, target

ELEMENTS = 4 * COUNTERS // (32 * WARPS)
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SEARCH_STEPS = 10  # for a table of 1024 tensors
WIDE = ("LDG.E.128", "STG.E.128")
SPILLS = ("STL", "LDL")
SHARED = ("STS", "LDS", "BAR")


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of the kernel for one compute capability (80 for 8.0), or one of AMD's architectures."""

    arch: int | str
    dtype: str
    mask: MaskKind = MaskKind.NONE
    stochastic: bool = False
    aligned: bool = True
    decay: bool = False
    in_place: bool = True

    @property
    def on_rocm(self) -> bool:
        return isinstance(self.arch, str)


@dataclasses.dataclass(frozen=True, slots=True)
class Static:
    """Counts of SASS instructions; those an element are of a pass that covers its blocks whole."""

    elements: int  # a thread and block
    first: float  # an element, in a pass of one direction over whole chunks
    further: float  # an element, for each further direction
    outside: float  # the part of `first` that stands outside the loop over blocks
    first_opcodes: dict[str, int]  # a thread and block, in a pass of one direction
    further_opcodes: dict[str, int]
    outside_opcodes: dict[str, int]  # a thread and chunk; the search's instructions once for each of its steps
    float_operations: list[str]  # the PTX opcodes on float32, whose suffixes tell how they round
    registers: int

    def count(self, prefix: str) -> int:
        """How many instructions have an opcode that starts so."""
        all_three = (self.first_opcodes, self.further_opcodes, self.outside_opcodes)
        return sum(n for opcodes in all_three for opcode, n in opcodes.items() if opcode.startswith(prefix))


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

    from .kernels import axpy_kernel

    constants = {
        "DTYPE": getattr(tl, TYPES[variant.dtype]),
        "MASK": int(variant.mask),
        "STOCHASTIC": variant.stochastic and variant.dtype != "fp32",
        "DECAY": variant.decay,
        "IN_PLACE": variant.in_place,
        "ALIGNED": variant.aligned,
        "COUNTERS": COUNTERS,
        "TARGET": "hip" if variant.on_rocm else "cuda",
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
    return triton.compile(source, target=gpu, options=OPTIONS).asm


def measure(variant: Variant) -> Static:
    """Compile a variant for a compute capability and count its instructions."""
    from triton import knobs

    asm = compile_kernel(variant)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG:, got {usage!r}")
    first, further, outside = _count(sass)
    spread = outside.total() / (ELEMENTS * MOST_BLOCKS)
    return Static(
        elements=ELEMENTS,
        first=first.total() / ELEMENTS + spread,
        further=further.total() / ELEMENTS,
        outside=spread,
        first_opcodes=dict(first.most_common()),
        further_opcodes=dict(further.most_common()),
        outside_opcodes=dict(outside.most_common()),
        float_operations=sorted(set(re.findall(r"\b[a-z]+\.(?:[\w]+\.)*f32\b", asm["ptx"]))),
        registers=int(registers[1]),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _count(sass: str) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Opcodes in the loop over blocks but not in that over directions, in the latter, and in neither."""
    opcodes: list[str] = []
    jumps: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?(?!NOP)([\w.]+).*?;)", line):
            if match[2].startswith("BRA") and (to := re.search(r"`\((\.L_x_\d+)\)", match[1])):
                jumps.append((len(opcodes), to[1]))
            opcodes.append(match[2])

    # A jump to itself only fills the kernel's end.
    loops = sorted({(labels[label], at) for at, label in jumps if labels[label] < at})
    inner_of = {loop: [x for x in loops if loop[0] <= x[0] and x[1] < loop[1]] for loop in loops}
    over_blocks = [loop for loop in loops if inner_of[loop]]
    if len(over_blocks) != 1 or len(loops) != 3 or inner_of[loops[0]]:
        raise RuntimeError(f"SASS: expected loops to search, over blocks and in it over the directions, got {loops}")
    search_start, search_end = loops[0]
    start, end = over_blocks[0]
    inner_start, inner_end = inner_of[start, end][0]
    further = Counter(opcodes[inner_start : inner_end + 1])
    first = Counter(opcodes[start:inner_start]) + Counter(opcodes[inner_end + 1 : end + 1])
    outside = Counter(opcodes[:search_start]) + Counter(opcodes[search_end + 1 : start])
    for opcode in opcodes[search_start : search_end + 1]:
        outside[opcode] += SEARCH_STEPS
    return first, further, outside


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the counts of all asked combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", choices=TYPES, nargs="+", default=list(TYPES))
    parser.add_argument("--mask", choices=[kind.name for kind in MaskKind], nargs="+", default=["NONE"])
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), nargs="+", default=["nearest"])
    parser.add_argument("--decay", action="store_true", help="decays other than 1")
    parser.add_argument("--unaligned", action="store_true", help="the path for odd sizes, offsets and addresses")
    asked = parser.parse_args(arguments)
    for arch, dtype, mask, rounding in itertools.product(asked.arch, asked.dtype, asked.mask, asked.rounding):
        variant = Variant(arch, dtype, MaskKind[mask], rounding == "stochastic", not asked.unaligned, asked.decay)
        row = dataclasses.asdict(variant) | {"mask": mask} | dataclasses.asdict(measure(variant))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
