"""`static`: what a pass compiles to for GPUs that need not be here, and the throughput that predicts."""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping

from zo_kernels.backends.types import MaskKind

from ..bench.registry import Case, Row
from .bound import predict
from .compilers import COMPILERS
from .machine_code import Static
from .peaks import COPY_FRACTION, GPUS, PIPES, Gpu

COLUMNS = (
    "case", "arch", "gpu", "compiler", "kernel", "dtype", "mask", "rounding", "skipped", "correct", "wrong",
    "instructions_per_element", "further_instructions_per_element", "registers", "spill_bytes", "load_bits",
    "store_bits", "bytes_per_element", "bound", "predicted_gelem_per_s", "predicted_gb_per_s",
    "predicted_share_of_copy", "compute_bound", "compute_gelem_per_s", "copy_fraction_of_peak", "peak_gb_per_s",
    "clock_ghz", "source", "is_prediction",
    "zo_kernels_version", "commit", "date_utc",
)  # fmt: skip
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Beside reading and writing the weights, an element. A recorded mask is written, the others are read.
_MASK_BYTES = {MaskKind.BOOL: 1.0, MaskKind.BITS: 1 / 8, MaskKind.RECORD: 1 / 8}


def cases(options: Namespace) -> list[Case]:
    return list(_cases(options))


def _cases(options: Namespace) -> Iterator[Case]:
    for compiler in COMPILERS:
        for arch in options.arch:
            for dtype in _BYTES:
                for mask in MaskKind:
                    yield _case(compiler, arch, dtype, mask, False)
                    if dtype != "fp32" and mask in (MaskKind.NONE, MaskKind.THRESHOLD):
                        yield _case(compiler, arch, dtype, mask, True)


def _case(compiler: str, arch: int, dtype: str, mask: MaskKind, stochastic: bool) -> Case:
    rounding = "stochastic" if stochastic else "nearest"
    kernel = f"in_place/{mask.name.lower()}/{rounding}"
    facts = {
        "arch": f"sm_{arch}",
        "compiler": compiler,
        "kernel": kernel,
        "dtype": dtype,
        "mask": mask.name.lower(),
        "rounding": rounding,
    }

    def measure() -> list[Row]:
        try:
            counted = COMPILERS[compiler].measure(arch, dtype, mask, stochastic)
        except RuntimeError as error:
            return [{"skipped": str(error)}]
        moved = 2 * _BYTES[dtype] + _MASK_BYTES.get(mask, 0.0)
        return [_counts(counted, moved) | _predicted(counted, moved, gpu) for gpu in GPUS if gpu.arch == arch]

    return Case(f"{compiler}/sm_{arch}/{dtype}/{kernel}", facts, measure, COMPILERS[compiler].unavailable())


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
    run: defaultdict[str, float] = defaultdict(float)
    for opcodes, times in ((counted.first_opcodes, 1.0), (counted.outside_opcodes, spread)):
        for opcode, count in opcodes.items():
            run[opcode] += times * count
    return dict(run)


def _predicted(counted: Static, bytes_per_element: float, gpu: Gpu) -> Row:
    found = predict(_run_for_a_block(counted), counted.elements, bytes_per_element, gpu)
    return {
        "gpu": gpu.name,
        "bound": found.bound,
        "predicted_gelem_per_s": found.gelem_per_s,
        "predicted_gb_per_s": found.gb_per_s,
        "predicted_share_of_copy": found.share_of_copy,
        "compute_bound": found.compute_bound,
        "compute_gelem_per_s": found.compute_gelem_per_s,
        "copy_fraction_of_peak": COPY_FRACTION,
        "peak_gb_per_s": gpu.gb_per_s,
        "clock_ghz": gpu.clock_ghz,
        "source": f"{gpu.source}; {PIPES[gpu.arch].source}",
        "is_prediction": True,
    }


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
