"""Builds zo_kernels._native and, where nvcc is found, zo_kernels._cuda.

Both need a C++17 compiler and pybind11, not PyTorch. _cuda contains the CUDA runtime, so it imports without a driver.

ZO_KERNELS_NATIVE=0 and ZO_KERNELS_CUDA=0 leave an extension out; asking the package for its backend is then an error.
ZO_KERNELS_CUDA=1 makes a missing nvcc an error. nvcc is $CUDA_HOME/bin/nvcc, or if CUDA_HOME is not set the one on
the PATH.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError
from setuptools.modified import newer_group

# Contraction would fuse a*b + c where docs/noise.md has two roundings. Reassociation would make the key the last
# operand in a Philox round's chain of xors, which costs a cycle of latency in each round.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
if sys.platform == "linux":  # an option of GCC, unknown to clang
    FLAGS.append("-fno-tree-reassoc")

CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
# Machine code for two generations, and PTX, which a driver compiles for later ones.
CUDA_FLAGS += [f"-gencode=arch=compute_{a},code={c}" for a, c in ((80, "sm_80"), (90, "sm_90"), (90, "compute_90"))]
CUDA_SOURCE = "csrc/cuda/launch.cu"


def find_nvcc():
    """The path of nvcc, or None if the CUDA extension is not built."""
    asked = os.environ.get("ZO_KERNELS_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        sys.exit(f"ZO_KERNELS_CUDA: expected 0, 1 or auto, got {asked!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None and asked == "1":
        where = f"{home}/bin" if home else "the PATH, and CUDA_HOME is not set"
        sys.exit(f"ZO_KERNELS_CUDA=1: expected nvcc, found none in {where}")
    return None if asked == "0" else nvcc


class Build(build_ext):
    """Builds _native with OpenMP, as PyTorch is, where the compiler has it, else with std::thread."""

    def build_extensions(self):
        for extension in self.extensions:
            if extension.name == "zo_kernels._cuda":
                self._add_kernels(extension)
            elif self._links("-fopenmp"):
                extension.extra_compile_args += ["-fopenmp"]
                extension.extra_link_args += ["-fopenmp"]
        super().build_extensions()

    def _add_kernels(self, extension):
        """Compile CUDA_SOURCE with nvcc, and link it and the static CUDA runtime into the extension."""
        nvcc, kernels = find_nvcc(), Path(self.build_temp) / Path(CUDA_SOURCE).with_suffix(".o")
        kernels.parent.mkdir(parents=True, exist_ok=True)
        if newer_group([*extension.depends, "setup.py"], str(kernels)):
            self._run(nvcc, *CUDA_FLAGS, "-c", CUDA_SOURCE, "-o", str(kernels))
        plan = self._run(nvcc, "--dryrun", "-c", CUDA_SOURCE)  # names the folders of nvcc's libraries
        folders = re.findall(r'"-L([^"]+)"', next(line for line in plan.splitlines() if "LIBRARIES=" in line))
        extension.extra_objects.append(str(kernels))
        extension.library_dirs += folders
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]

    def _run(self, *command):
        print(" ".join(command))
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise CompileError(f"{command[0]} failed:\n{done.stdout}")
        return done.stdout

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
            sources=sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    )
if find_nvcc():
    extensions.append(
        Pybind11Extension(
            "zo_kernels._cuda",
            sources=["csrc/cuda/bindings.cpp"],
            depends=[CUDA_SOURCE, *sorted(glob("csrc/*.h") + glob("csrc/cuda/*.h"))],
            cxx_std=17,
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
        )
    )

with ParallelCompile():
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})
