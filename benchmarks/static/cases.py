"""`static`: what a pass compiles to for GPUs that need not be here, and the throughput that predicts."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from zo_kernels.backends.types import MaskKind

from ..bench.registry import Case, Row
from . import cuda, triton
from .bound import predict
from .machine_code import Static, Variant
from .peaks import COPY_FRACTION, GPUS, PIPES

COMPILERS: dict[str, Any] = {"triton": triton, "nvcc": cuda}  # each has `unavailable` and `measure`
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Beside reading and writing the weights, an element. A recorded mask is written, the others are read.
_MASK_BYTES = {MaskKind.BOOL: 1.0, MaskKind.BITS: 1 / 8, MaskKind.RECORD: 1 / 8}


def cases(options: Namespace) -> list[Case]:
    return [
        _case(compiler, Variant(arch, dtype, mask, stochastic, distribution=distribution))
        for compiler in COMPILERS
        for arch in options.arch
        for distribution in options.distribution
        for dtype in _BYTES
        for mask in MaskKind
        for stochastic in (False, True)
        if not stochastic or (dtype != "fp32" and mask in (MaskKind.NONE, MaskKind.THRESHOLD))
    ]


def _case(compiler: str, variant: Variant) -> Case:
    dtype, mask = variant.dtype, variant.mask.name.lower()
    rounding = "stochastic" if variant.stochastic else "nearest"
    arch, kernel = f"sm_{variant.arch}", f"in_place/{mask}/{rounding}"
    if variant.distribution != "normal":
        kernel += f"/{variant.distribution}"
    facts = {"arch": arch, "compiler": compiler, "kernel": kernel, "dtype": dtype, "mask": mask, "rounding": rounding}
    facts["distribution"] = variant.distribution

    def measure() -> list[Row]:
        counted = COMPILERS[compiler].measure(variant)
        moved = 2 * _BYTES[dtype] + _MASK_BYTES.get(variant.mask, 0.0)
        run, gpus = _run_for_a_block(counted), [gpu for gpu in GPUS if gpu.arch == variant.arch]
        return [_counts(counted, moved) | predict(run, counted.elements, moved, gpu) for gpu in gpus]

    return Case(f"{compiler}/{arch}/{dtype}/{kernel}", facts, measure, COMPILERS[compiler].unavailable())


def _counts(counted: Static, bytes_per_element: float) -> Row:
    opcodes = counted.first_opcodes
    every = (opcodes, counted.further_opcodes, counted.outside_opcodes)
    return {
        "instructions_per_element": counted.first,
        "further_instructions_per_element": counted.further,
        "registers": counted.registers,
        "spill_bytes": sum(n * bits // 8 for part in every for n, bits in _widths(part, "STL")),
        "load_bits": max((bits for _, bits in _widths(opcodes, "LDG")), default=None),
        "store_bits": max((bits for _, bits in _widths(opcodes, "STG")), default=None),
        "bytes_per_element": bytes_per_element,
    }


def _widths(opcodes: Mapping[str, int], name: str) -> Iterator[tuple[int, int]]:
    """(how often, bits) of each kind of memory access of that name; one that does not say its width has 32 bits."""
    for opcode, count in opcodes.items():
        if opcode.partition(".")[0] == name:
            width = re.search(r"\.[US]?(8|16|64|128)(?=\.|$)", opcode)
            yield count, int(width[1]) if width else 32


def _run_for_a_block(counted: Static) -> dict[str, float]:
    """How often a thread runs each opcode for a block, with its part of what it does once for many blocks."""
    once = sum(counted.outside_opcodes.values())
    spread = counted.outside * counted.elements / once if once else 0.0
    run: dict[str, float] = dict(counted.first_opcodes)
    for opcode, count in counted.outside_opcodes.items():
        run[opcode] = run.get(opcode, 0.0) + spread * count
    return run


def cells(row: Row) -> dict[str, str]:
    return {
        "GPU": row["gpu"],
        "instr/elem": f"{row['instructions_per_element']:.1f}",
        "further": f"{row['further_instructions_per_element']:.1f}",
        "registers": str(row["registers"]),
        "spilled B": str(row["spill_bytes"]),
        "load/store bits": f"{row['load_bits']}/{row['store_bits']}",
        "B/elem": f"{row['bytes_per_element']:g}",
        "bound": row["bound"],
        "predicted Gelem/s": f"{row['predicted_gelem_per_s']:.0f}",
        "compute alone": f"{row['compute_gelem_per_s']:.0f} ({row['compute_bound']})",
        "predicted GB/s": f"{row['predicted_gb_per_s']:.0f}",
        "predicted of copy": f"{row['predicted_share_of_copy']:.0%}",
    }


def notes() -> list[str]:
    """What must be read beside the table."""
    sources = [f"{gpu.name}: {gpu.source}; {PIPES[gpu.arch].source}" for gpu in GPUS]
    return [
        f"Predictions, not measurements. A copy is taken to reach {COPY_FRACTION:.0%} of the peak bandwidth.",
        *sources,
    ]
