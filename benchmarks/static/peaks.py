"""What GPUs can do at the most, and where each number comes from. Nothing here was measured by these benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

# Of the peak bandwidth, what a large copy is taken to reach. An assumption: the benchmarks measure the copy itself.
COPY_FRACTION = 0.92

# Threads an SM can issue in a clock: four schedulers, each a warp of 32 (A100 and H100 whitepapers, the SM).
ISSUED_PER_CLOCK = 128

_GUIDE = "CUDA C++ Programming Guide, Throughput of Native Arithmetic Instructions"
_A100 = "NVIDIA A100 Tensor Core GPU Architecture (whitepaper)"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture (whitepaper)"


@dataclass(frozen=True)
class Pipes:
    """Threads an SM can run through each unit in a clock.

    Args:
        fma: float32 multiply-adds, and integer ones, which share the unit.
        imad: integer multiply-adds alone.
        alu: integer additions, logic, shifts, permutations, comparisons, selections.
        xu: square roots and other special functions, and the conversions that are done there.
        convert: conversions of 32-bit numbers that are done elsewhere (I2FP, F2FP).
    """

    fma: int
    imad: int
    alu: int
    xu: int
    convert: int
    source: str


PIPES = {
    80: Pipes(fma=64, imad=64, alu=64, xu=16, convert=64, source=f"{_GUIDE}, compute capability 8.0"),
    90: Pipes(fma=128, imad=64, alu=64, xu=16, convert=64, source=f"{_GUIDE}, compute capability 9.0"),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    Args:
        arch: its compute capability times ten.
        clock_ghz: of the SMs, at which the pipes' throughput is taken.
        gb_per_s: peak of its memory.
    """

    name: str
    arch: int
    sms: int
    clock_ghz: float
    gb_per_s: float
    source: str


GPUS = (
    Gpu("A100-40", 80, 108, 1.41, 1555.0, f"{_A100}, table 4: 108 SMs, boost 1410 MHz, 1555 GB/s"),
    Gpu("A100-80", 80, 108, 1.41, 2039.0, f"{_A100}: 108 SMs, boost 1410 MHz; A100 datasheet, 80GB SXM: 2039 GB/s"),
    # At its highest clock, 1.98 GHz, the whitepaper's 66.9 TFLOPS of fp32 hold; its tensor throughput is for 1.83 GHz.
    Gpu("H100", 90, 132, 1.83, 3350.0, f"{_H100}, H100 SXM5: 132 SMs, boost 1830 MHz; H100 datasheet: 3.35 TB/s"),
)
