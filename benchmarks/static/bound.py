"""From a count of machine instructions to the throughput they allow: a prediction, not a measurement.

Each instruction takes its share of the issue slots, and of the unit that runs it; the weights take the memory's. What
would take longest bounds the kernel, everything else is taken to be hidden behind it: latencies, the tail of a launch
and instructions that wait for each other can only make it slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from .peaks import COPY_FRACTION, ISSUED_PER_CLOCK, PIPES, Gpu

BANDWIDTH = "bandwidth"

_FLOAT = ("FFMA", "FMUL", "FADD")
_XU = ("MUFU", "I2F", "F2I", "F2F", "I2I", "FRND", "POPC")
_CONVERT = ("I2FP", "F2FP")
_ALU = (
    "BMSK", "FMNMX", "FSEL", "FSET", "FSETP", "IABS", "IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "PLOP3",
    "PRMT", "SEL", "SGXT", "SHF", "SHL", "SHR", "VABSDIFF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3", "VOTE",
)  # fmt: skip


def unit_of(opcode: str) -> str | None:
    """The unit that runs an instruction; None for what is counted as issued alone (control, memory, uniform U*)."""
    name = opcode.partition(".")[0]
    if name in _CONVERT:
        return "convert"
    if name in _XU:
        return "xu"
    if name in _FLOAT:
        return "float"
    if name == "IMAD":
        return "imad"
    return "alu" if name in _ALU else None


@dataclass(frozen=True)
class Prediction:
    """The slowest of the bounds, and what it leaves.

    Args:
        bound: "issue", a unit's name ("fma", "imad", "alu", "xu", "convert") or "bandwidth".
        gelem_per_s: elements.
        gb_per_s: bytes read and written.
        share_of_copy: of what a copy is taken to reach.
        compute_bound, compute_gelem_per_s: the slowest bound apart from the bandwidth.
    """

    bound: str
    gelem_per_s: float
    gb_per_s: float
    share_of_copy: float
    compute_bound: str
    compute_gelem_per_s: float


def limits(opcodes: Mapping[str, float], elements: int, bytes_per_element: float, gpu: Gpu) -> dict[str, float]:
    """Elements a second, in units of 10^9, that each bound allows by itself.

    Args:
        opcodes: how often a thread runs each.
        elements: that it makes by them.
        bytes_per_element: read and written.
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


def predict(opcodes: Mapping[str, float], elements: int, bytes_per_element: float, gpu: Gpu) -> Prediction:
    allowed = limits(opcodes, elements, bytes_per_element, gpu)
    slowest = sorted(allowed, key=lambda name: allowed[name])
    bound, compute = slowest[0], next(name for name in slowest if name != BANDWIDTH)
    gb_per_s = allowed[bound] * bytes_per_element
    share = gb_per_s / (COPY_FRACTION * gpu.gb_per_s)
    return Prediction(bound, allowed[bound], gb_per_s, share, compute, allowed[compute])
