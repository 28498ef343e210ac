"""The CUDA backend on a machine without a GPU: its kernels built for the host, each thread of a launch run in turn."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_double, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "tests/emulation/cuda.cpp"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return shutil.which(os.environ.get("CXX", "g++"))


class Emulated:
    """Stands in for zo_kernels._cuda; addresses are the host's."""

    def __init__(self, library: ctypes.CDLL):
        self.axpy, self.record, self.round_pair = library.axpy, library.record, library.round_pair
        self.axpy.argtypes = [*[c_int] * 5, *[c_void_p] * 3, *[c_int] * 3, *[c_void_p] * 3, c_int, c_void_p]
        self.record.argtypes = [c_int, c_void_p, c_void_p, c_double, c_int64, c_void_p]
        self.round_pair.argtypes = [c_int, *[c_uint32] * 4]
        self.round_pair.restype = c_uint32


def build() -> Emulated:
    """Compile it, or take what an earlier run made of the same sources."""
    sources = [SOURCE, *sorted(ROOT.glob("csrc/**/*.h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + " ".join(FLAGS).encode()).hexdigest()
    library = ROOT / f"build/emulated/cuda-{digest[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # so that nobody loads half a file
            fresh = Path(folder) / library.name
            command = [compiler(), *FLAGS, f"-I{ROOT / 'csrc'}", str(SOURCE), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            fresh.replace(library)
    return Emulated(ctypes.CDLL(str(library)))
