"""Builds zo_kernels._native. It needs a C++17 compiler and pybind11, not PyTorch.

ZO_KERNELS_NATIVE=0 leaves it out: the package then runs on its other backends and says so when asked for this one.
"""

import os
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

# Contraction would fuse a*b + c where the specification has two roundings; see docs/noise.md. Reassociation would put
# the key of a Philox round last in its chain of xors, a cycle of latency a round.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
if sys.platform == "linux":  # GCC's; clang has no such option
    FLAGS.append("-fno-tree-reassoc")
SOURCES = ["bindings", "cpu", "cpu_scalar", "cpu_avx2", "cpu_avx512"]
HEADERS = ["noise", "axpy", "cpu", "cpu_scalar", "cpu_noise", "cpu_memory", "cpu_kernel", "simd_avx2", "simd_avx512"]


class Build(build_ext):
    """Threads come from OpenMP where the compiler has it, so that they are PyTorch's own, else from std::thread."""

    def build_extensions(self):
        if self._links("-fopenmp"):
            for extension in self.extensions:
                extension.extra_compile_args += ["-fopenmp"]
                extension.extra_link_args += ["-fopenmp"]
        super().build_extensions()

    def _links(self, flag):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cpp"
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, "empty", output_dir=folder, extra_postargs=[flag])
            except (CompileError, LinkError):
                return False
        return True


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
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})
