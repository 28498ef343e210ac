"""From a count of machine instructions to the throughput they allow: a prediction, not a measurement.

Each instruction takes its share of the issue slots, and of the unit that runs it; the weights take the memory's. What
would take longest bounds the kernel, everything else is taken to be hidden behind it: latencies, the tail of a launch
and instructions that wait for each other can only make it slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from ..bench.registry import Row
from .peaks import COPY_FRACTION, ISSUED_PER_CLOCK, PIPES, Gpu

BANDWIDTH = "bandwidth"

_UNITS = {
    "float": "FFMA FMUL FADD",
    "imad": "IMAD",
    "xu": "MUFU I2F F2I F2F I2I FRND POPC",
    "convert": "I2FP F2FP",
    "alu": "BMSK FMNMX FSEL FSET FSETP IABS IADD IADD3 IMNMX ISETP LEA LOP3 MOV PLOP3 PRMT SEL SGXT SHF SHL SHR "
    "VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE",
}
_UNIT_OF = {opcode: unit for unit, opcodes in _UNITS.items() for opcode in opcodes.split()}


def unit_of(opcode: str) -> str | None:
    """The unit that runs an instruction; None for what is counted as issued alone (control, memory, uniform U*)."""
    return _UNIT_OF.get(opcode.partition(".")[0])


def limits(opcodes: Mapping[str, float], elements: int, bytes_per_element: float, gpu: Gpu) -> dict[str, float]:
    """Elements a second, in units of 10^9, that each bound allows by itself.

    Args:
        opcodes: how often a thread runs each.
        elements: that it makes by them.
        bytes_per_element: read and written.

    Returns:
        By bound: "issue", the name of a unit ("fma", "imad", "alu", "xu", "convert") or "bandwidth".
    """
    units: defaultdict[str | None, float] = defaultdict(float)
    for opcode, count in opcodes.items():
        units[unit_of(opcode)] += count
    pipes = PIPES[gpu.arch]
    clocks = {  # of an SM, a thread
        "issue": sum(opcodes.values()) / ISSUED_PER_CLOCK,
        "fma": (units["float"] + units["imad"]) / pipes.fma,
        "imad": units["imad"] / pipes.imad,
        "alu": units["alu"] / pipes.alu,
        "xu": units["xu"] / pipes.xu,
        "convert": units["convert"] / pipes.convert,
    }
    rate = gpu.sms * gpu.clock_ghz * elements
    allowed = {name: rate / taken for name, taken in clocks.items() if taken}
    return allowed | {BANDWIDTH: COPY_FRACTION * gpu.gb_per_s / bytes_per_element}


def predict(opcodes: Mapping[str, float], elements: int, bytes_per_element: float, gpu: Gpu) -> Row:
    """The slowest of the bounds and the throughput it leaves, and the slowest apart from the bandwidth."""
    allowed = limits(opcodes, elements, bytes_per_element, gpu)
    slowest = sorted(allowed, key=lambda name: allowed[name])
    bound, compute = slowest[0], next(name for name in slowest if name != BANDWIDTH)
    return {
        "gpu": gpu.name,
        "bound": bound,
        "predicted_gelem_per_s": allowed[bound],
        "predicted_gb_per_s": allowed[bound] * bytes_per_element,
        "predicted_share_of_copy": allowed[bound] / allowed[BANDWIDTH],
        "compute_bound": compute,
        "compute_gelem_per_s": allowed[compute],
        "copy_fraction_of_peak": COPY_FRACTION,
        "peak_gb_per_s": gpu.gb_per_s,
        "clock_ghz": gpu.clock_ghz,
        "source": f"{gpu.source}; {PIPES[gpu.arch].source}",
        "is_prediction": True,
    }
