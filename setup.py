"""Builds zo_kernels._native. It needs a C++17 compiler and pybind11, not PyTorch.

ZO_KERNELS_NATIVE=0 leaves it out: the package then runs on its other backends and says so when asked for this one.
"""

import os
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Contraction would fuse a*b + c where the specification has two roundings; see docs/noise.md. Reassociation would put
# the key of a Philox round last in its chain of xors, a cycle of latency a round.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
if sys.platform == "linux":  # GCC's; clang has no such option
    FLAGS.append("-fno-tree-reassoc")
SOURCES = ["bindings", "cpu", "cpu_scalar", "cpu_avx2", "cpu_avx512"]
HEADERS = ["noise", "axpy", "cpu", "cpu_scalar", "cpu_noise", "cpu_memory", "cpu_kernel", "simd_avx2", "simd_avx512"]

extensions = []
if os.environ.get("ZO_KERNELS_NATIVE", "1") != "0":
    extensions.append(
        Pybind11Extension(
            "zo_kernels._native",
            sources=[f"csrc/{name}.cpp" for name in SOURCES],
            depends=[f"csrc/{name}.h" for name in HEADERS],
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    )

with ParallelCompile():
    setup(ext_modules=extensions, cmdclass={"build_ext": build_ext})
