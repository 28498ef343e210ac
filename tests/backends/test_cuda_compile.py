"""The CUDA kernel compiled for GPUs that need not be here: what a machine with nvcc alone can hold it to."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from benchmarks.static import cuda as cuda_static
from zo_kernels.backends.types import MaskKind

pytestmark = pytest.mark.skipif(cuda_static.nvcc() is None, reason="there is no nvcc")

NONE, THRESHOLD, BOOL, BITS, RECORD = MaskKind
ARCHITECTURES = (80, 90)

# dtype, mask, stochastic, decay -> at most so many instructions an element in a pass of one direction, and registers.
# Counted with nvcc 13.0 on sm_80 and sm_90, in this order: 28.0 28.1, 29.2 29.3, 29.2 29.3, 30.2 30.4, 30.1 30.3,
# 32.5 32.7, 33.9 34.0, 31.6 31.8, 31.8 32.0, 38.3 38.4.
BOUNDS = {
    ("fp32", NONE, False, False): (29, 72),
    ("bf16", NONE, False, False): (30, 64),
    ("fp16", NONE, False, False): (30, 64),
    ("bf16", NONE, False, True): (31, 64),
    ("fp32", THRESHOLD, False, False): (31.5, 80),
    ("fp32", RECORD, False, False): (33.5, 80),
    ("bf16", THRESHOLD, True, False): (34.5, 80),
    ("bf16", BOOL, False, False): (33, 80),
    ("bf16", BITS, False, False): (32.5, 80),
    ("fp16", RECORD, True, False): (39, 80),
}
FURTHER_BOUND = 29


@pytest.fixture(scope="module")
def compiled():
    """{architecture: {variant: Static}}; a variant that spills registers raises."""
    with ThreadPoolExecutor() as pool:
        counted = pool.map(lambda arch: cuda_static.measure_all(arch, list(BOUNDS)), ARCHITECTURES)
        return {arch: dict(zip(BOUNDS, of, strict=True)) for arch, of in zip(ARCHITECTURES, counted, strict=True)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", BOUNDS, ids=str)
def test_compiled_kernel(compiled, arch, variant):
    static, (instructions, registers) = compiled[arch][variant], BOUNDS[variant]
    assert static.first <= instructions
    assert static.further <= FURTHER_BOUND
    assert static.registers <= registers
    assert not any(static.count(opcode) for opcode in ("STL", "LDL", "STS", "LDS", "BAR"))
    dtype, mask = variant[:2]
    rows = static.elements // (4 if dtype == "fp32" else 8)
    for opcode in ("LDG.E.128", "STG.E.128"):  # every element, and by nothing narrower
        assert static.first_opcodes[opcode] == rows
    narrow = {
        opcode: n for opcode, n in static.first_opcodes.items() if opcode[:3] in ("LDG", "STG") and "128" not in opcode
    }
    assert sum(narrow.values()) <= {NONE: 0, THRESHOLD: 0, RECORD: 2}.get(mask, 4), narrow


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_pass_is_exact(compiled, arch):
    """Nothing is contracted, flushed or approximated but rsqrt, which two fma correct."""
    for variant, static in compiled[arch].items():
        opcodes = {*static.first_opcodes, *static.further_opcodes}
        assert not any(".FTZ" in opcode for opcode in opcodes), variant
        assert {o for o in opcodes if o.startswith("MUFU")} == {"MUFU.RSQ"}, variant
        # A pair: 18 fma of two normals, 2 of their sum with the weights. One more would be a product contracted.
        assert static.first_opcodes["FFMA"] == static.further_opcodes["FFMA"] == 20 * static.elements // 2, variant


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_variant_spills(arch):
    variants = product(("fp32", "bf16", "fp16"), MaskKind, (False, True), (False, True))
    cuda_static.measure_all(arch, [v for v in variants if not (v[0] == "fp32" and v[2])])


LOADED = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
loader = ExtensionFileLoader("_cuda", sys.argv[1])
cuda = module_from_spec(spec_from_file_location("_cuda", sys.argv[1], loader=loader))
loader.exec_module(cuda)
if error := cuda.device_error():
    try:
        cuda.record(0, 0, 0, 0.0, 8, 0)
    except RuntimeError as said:
        assert error in str(said), said
    else:
        raise AssertionError("expected a launch without a device to fail")
"""


@pytest.mark.slow
def test_the_extension_builds_and_needs_no_driver_to_be_imported(tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | {"ZO_KERNELS_CUDA": "1", "ZO_KERNELS_NATIVE": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects"]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    [library] = tmp_path.glob("zo_kernels/_cuda*")
    subprocess.run([sys.executable, "-c", LOADED, str(library)], check=True)
