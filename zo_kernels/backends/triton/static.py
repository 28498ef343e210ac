"""What the kernel compiles to, for a GPU that need not be here: instructions, wide accesses, spills.

    python -m zo_kernels.backends.triton.static --arch 80 90 --dtype fp32 bf16

prints one JSON object a variant. The numbers are static counts of SASS instructions. A pass of one direction runs
through all of them but the loop over further directions, and through nothing twice, so they are what a thread executes.
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
from collections.abc import Sequence

from ..types import MaskKind
from .launch import COUNTERS, OPTIONS, WARPS, target

ELEMENTS = 4 * COUNTERS // (32 * WARPS)
DTYPES = ("fp32", "bf16", "fp16")
WIDE = ("LDG.E.128", "STG.E.128")
SPILLS = ("STL", "LDL")


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of the kernel for one compute capability."""

    arch: int
    dtype: str
    mask: MaskKind = MaskKind.NONE
    stochastic: bool = False
    aligned: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Static:
    """Counts of SASS instructions; those an element are of a pass that covers its blocks whole."""

    elements: int  # a thread
    first: float  # an element, in a pass of one direction
    further: float  # an element, for each further direction
    first_opcodes: dict[str, int]  # a thread, in a pass of one direction
    further_opcodes: dict[str, int]
    float_operations: list[str]  # the PTX opcodes on float32, whose suffixes tell how they round
    registers: int

    def count(self, prefix: str) -> int:
        """How many instructions of the whole kernel have an opcode that starts so."""
        both = itertools.chain(self.first_opcodes.items(), self.further_opcodes.items())
        return sum(n for opcode, n in both if opcode.startswith(prefix))


def compile_kernel(variant: Variant) -> tuple[str, bytes]:
    """The kernel as it would be launched, as PTX and as a cubin.

    Raises:
        RuntimeError: this process runs the kernels in Triton's interpreter.
    """
    if target() == "interpreter":
        raise RuntimeError("expected compiled kernels, got Triton's interpreter: unset TRITON_INTERPRET")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .kernels import axpy_kernel

    constants = {
        "MASK": int(variant.mask),
        "STOCHASTIC": variant.stochastic and variant.dtype != "fp32",
        "ALIGNED": variant.aligned,
        "COUNTERS": COUNTERS,
        "TARGET": "cuda",
    }
    weights = f"*{variant.dtype}"
    types = {"dst": weights, "src": weights, "seeds": "*u64", "scales": "*fp32", "decays": "*fp32"}
    types |= {p.name: p.annotation_type for p in axpy_kernel.params if p.annotation_type}
    if variant.mask in (MaskKind.NONE, MaskKind.THRESHOLD):
        constants["mask"] = None
    else:
        types["mask"] = "*u8"
    signature = {name: types.get(name, "constexpr") for name in axpy_kernel.arg_names}
    source = ASTSource(axpy_kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=OPTIONS)
    return built.asm["ptx"], built.asm["cubin"]


def measure(variant: Variant) -> Static:
    """Compile a variant and count its instructions."""
    from triton import knobs

    ptx, cubin = compile_kernel(variant)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG:, got {usage!r}")
    first, further = _count(sass)
    return Static(
        elements=ELEMENTS,
        first=first.total() / ELEMENTS,
        further=further.total() / ELEMENTS,
        first_opcodes=dict(first.most_common()),
        further_opcodes=dict(further.most_common()),
        float_operations=sorted(set(re.findall(r"\b[a-z]+\.(?:[\w]+\.)*f32\b", ptx))),
        registers=int(registers[1]),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _count(sass: str) -> tuple[Counter[str], Counter[str]]:
    instructions: list[tuple[str, str]] = []  # opcode, the whole
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?(?!NOP)([\w.]+).*?;)", line):
            instructions.append((match[2], match[1]))

    in_loop = [False] * len(instructions)
    loops = 0
    for i, (opcode, text) in enumerate(instructions):
        jump = re.search(r"`\((\.L_x_\d+)\)", text) if opcode.startswith("BRA") else None
        if jump and labels[jump[1]] < i:  # a jump to itself only fills the kernel's end
            loops += 1
            in_loop[labels[jump[1]] : i + 1] = [True] * (i + 1 - labels[jump[1]])
    if loops != 1:
        raise RuntimeError(f"SASS: expected one loop, over the directions, got {loops}")
    first = Counter(opcode for (opcode, _), inside in zip(instructions, in_loop, strict=True) if not inside)
    further = Counter(opcode for (opcode, _), inside in zip(instructions, in_loop, strict=True) if inside)
    return first, further


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the counts of all asked combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--mask", choices=[kind.name for kind in MaskKind], nargs="+", default=["NONE"])
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), nargs="+", default=["nearest"])
    parser.add_argument("--unaligned", action="store_true", help="the path for odd sizes, offsets and addresses")
    asked = parser.parse_args(arguments)
    for arch, dtype, mask, rounding in itertools.product(asked.arch, asked.dtype, asked.mask, asked.rounding):
        variant = Variant(arch, dtype, MaskKind[mask], rounding == "stochastic", not asked.unaligned)
        row = dataclasses.asdict(variant) | {"mask": mask} | dataclasses.asdict(measure(variant))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
