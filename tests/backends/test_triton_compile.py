"""The Triton kernel compiled for GPUs that need not be here: what a CPU can hold a GPU kernel to."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.static.machine_code import GROUP, Static
from zo_kernels import spec
from zo_kernels.backends.types import MaskKind

ROOT = Path(__file__).parents[2]
WIDE = ("LDG.E.128", "STG.E.128")
SPILLS_AND_SHARED = ("STL", "LDL", "STS", "LDS", "BAR")

NONE, THRESHOLD = MaskKind.NONE, MaskKind.THRESHOLD
ARCHITECTURES = (80, 90)
ALIGNED, UNALIGNED = True, False

# distribution, dtype, mask, stochastic, aligned -> at most so many instructions an element in a pass of one direction.
# Counted with triton 3.9 on sm_80 and sm_90: 29.0 29.1, 29.6 29.9, 29.6 29.9; 31.1 31.3, 36.6 37.5, 39.6 40.8; and of
# signs 8.1 8.5, 8.8 9.2, 15.1 16.0, 21.4 21.4. Older versions: up to half an instruction more.
BOUNDS = {
    ("normal", "fp32", NONE, False, ALIGNED): 30.1,
    ("normal", "bf16", NONE, False, ALIGNED): 30.6,
    ("normal", "fp16", NONE, False, ALIGNED): 30.6,
    ("normal", "fp32", THRESHOLD, False, ALIGNED): 33.1,
    ("normal", "bf16", THRESHOLD, True, ALIGNED): 38.6,
    ("normal", "fp16", THRESHOLD, True, ALIGNED): 41.6,
    ("rademacher", "fp32", NONE, False, ALIGNED): 9.5,
    ("rademacher", "bf16", NONE, False, ALIGNED): 10,
    ("rademacher", "bf16", NONE, True, ALIGNED): 17,
    ("rademacher", "fp16", THRESHOLD, True, ALIGNED): 22.5,
}
# Counted: 26.9 and 26.8, whatever the dtype, the mask and the rounding; of signs 4.2, where eight directions are made
# together.
FURTHER_BOUND = {"normal": 28, "rademacher": 4.7}
# Of signs; twenty warps fit a multiprocessor. Counted: 48 to 56, and 96 of the last.
REGISTERS = 96

# The other combinations that a pass can ask for need only come out.
REST = [
    (distribution, *key)
    for distribution in spec.DISTRIBUTIONS
    for key in [
        ("bf16", NONE, True, ALIGNED),
        ("fp16", NONE, True, ALIGNED),
        ("bf16", THRESHOLD, False, ALIGNED),
        ("fp16", THRESHOLD, False, ALIGNED),
        *((dtype, mask, False, ALIGNED) for dtype in ("fp32", "bf16") for mask in MaskKind if mask > THRESHOLD),
        *(
            (dtype, mask, dtype != "fp32", UNALIGNED)
            for dtype in ("fp32", "bf16")
            for mask in MaskKind
            if mask < MaskKind.RECORD
        ),
    ]
    if (distribution, *key) not in BOUNDS
]

# Operations on float32 whose result does not depend on how a compiler contracts, reorders or flushes: what rounds says
# so. rsqrt alone is approximate, and corrected by the two fma that follow it.
EXACT = {
    "abs.f32", "add.rn.f32", "cvt.f32", "cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32", "cvt.rn.f16.f32", "cvt.rn.f16x2.f32",
    "cvt.rn.f32", "cvt.rzi.s32.f32", "fma.rn.f32", "max.f32", "min.NaN.f32", "min.f32", "mul.rn.f32", "neg.f32",
    "rsqrt.approx.ftz.f32", "selp.f32", "setp.le.f32", "setp.num.f32", "sub.rn.f32",
}  # fmt: skip

# For an MI300; nothing of it has run. distribution, dtype, mask, stochastic.
ROCM = (
    ("normal", "fp32", NONE, False),
    ("normal", "bf16", THRESHOLD, True),
    ("rademacher", "bf16", THRESHOLD, True),
)

# The tests themselves run Triton's interpreter, so the compiler needs a process of its own: one, since most of its time
# is that of imports.
DRIVER = """
import dataclasses, json, sys
import torch, zo_kernels
assert "triton" not in sys.modules, "importing zo_kernels imported triton"
from zo_kernels.backends.triton import unavailable
print(json.dumps(unavailable(torch.device("cpu"))), flush=True)
from benchmarks.static.triton import Variant, compile_kernel, measure
from zo_kernels.backends.types import MaskKind
counted, rocm = json.loads(sys.argv[1])
for arch, distribution, dtype, mask, stochastic, aligned in counted:
    row = measure(Variant(arch, dtype, MaskKind(mask), stochastic, aligned, distribution=distribution))
    print(json.dumps(dataclasses.asdict(row)), flush=True)
for distribution, dtype, mask, stochastic in rocm:
    variant = Variant("gfx942", dtype, MaskKind(mask), stochastic, decay=True, distribution=distribution)
    print(json.dumps(compile_kernel(variant)["amdgcn"]), flush=True)
"""


def compile_all(keys, architectures=ARCHITECTURES, rocm=()):
    """Why no CPU, {(architecture, key): Static}, and the code of each of `rocm`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    every = list(product(architectures, keys))
    asked = json.dumps([[(arch, *key) for arch, key in every], rocm])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, asked], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reason, *rows = map(json.loads, done.stdout.splitlines())
    counted = [Static(**row) for row in rows[: len(every)]]
    return reason, dict(zip(every, counted, strict=True)), dict(zip(rocm, rows[len(every) :], strict=True))


@pytest.fixture(scope="module")
def compiled():
    return compile_all(list(BOUNDS), rocm=ROCM)


def test_compiled_kernels_refuse_the_cpu_and_say_why(compiled):
    assert "TRITON_INTERPRET=1" in compiled[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("key", BOUNDS, ids=str)
def test_compiled_kernel(compiled, arch, key):
    static, (distribution, dtype, *_) = compiled[1][arch, key], key
    assert static.first <= BOUNDS[key]
    assert static.further <= FURTHER_BOUND[distribution]
    assert set(static.float_operations) <= EXACT
    size = 4 if dtype == "fp32" else 2
    for opcode in WIDE:  # every element, and by nothing narrower
        assert static.first_opcodes[opcode] * 16 // size == static.elements
    assert static.count("STG") == static.count("STG.E.128")
    assert not any(static.count(opcode) for opcode in SPILLS_AND_SHARED)
    if distribution == "rademacher":
        assert static.registers <= REGISTERS
        # Of a full group of directions: each element is added to once a direction, and four words and a scale shared.
        assert static.further_opcodes["FADD"] == GROUP * static.elements
        assert static.further_opcodes["SHFL.IDX"] == GROUP * 5


@pytest.mark.slow
def test_every_other_specialisation_compiles():
    with ThreadPoolExecutor() as pool:
        for _, kernels, _ in pool.map(lambda arch: compile_all(REST, [arch]), ARCHITECTURES):
            for key, static in kernels.items():
                assert set(static.float_operations) <= EXACT, key


TUNED = """
from benchmarks.static.triton import Variant, measure
from zo_kernels.backends.tuning import Tuning
from zo_kernels.backends.types import MaskKind
for arch in (80, 90):
    for key in (("fp32", MaskKind.NONE, False), ("bf16", MaskKind.NONE, True), ("bf16", MaskKind.BITS, False)):
        signs = measure(Variant(arch, *key, distribution="rademacher", tuning=Tuning(warps=8)))
        assert not any(signs.count(opcode) for opcode in ("STL", "LDL", "STS", "LDS", "BAR")), (arch, key)
        usual = measure(Variant(arch, *key))
        for tuning, more in ((Tuning(prefetch=True), 2.2), (Tuning(warps=8), 2.5), (Tuning(warps=2), 0.0)):
            tuned = measure(Variant(arch, *key, tuning=tuning))
            assert tuned.first <= usual.first + more, (arch, key, tuning, usual.first, tuned.first)
            # Two warps have no registers left for a mask.
            spills = tuned.count("STL") or tuned.count("LDL")
            assert not spills or (tuning.warps == 2 and key[1] != MaskKind.NONE), (arch, key, tuning)
"""


@pytest.mark.slow
def test_tunings_compile():
    """What a GPU is to choose from: a few instructions more or less, and no spills where one might choose it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", TUNED], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("key", ROCM, ids=str)
def test_rocm_compiles(compiled, key):
    """64-bit products in one instruction, no scratch memory."""
    code = compiled[2][key]
    assert "s_barrier" not in code, "words go through shared memory"
    assert "v_mad_u64_u32" in code, "no widening multiplication"
    assert re.search(r"private_segment_fixed_size: *0\b", code), "it spills"
