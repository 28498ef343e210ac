"""The C++ under sanitizers: `python run.py`, or `make sanitize`. Two to four minutes on two cores.

Builds csrc three times, plain, with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer (then
without OpenMP, whose runtime it does not know, so with std::thread), runs `driver.py` on each, and fails on any report,
on a difference of bits between the builds, on a call that should have been refused, and on a leak.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
OUT = ROOT / "build/sanitized"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall"]
UNDEFINED = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
BUILDS = {"plain": ["-fopenmp"], "address": [*UNDEFINED, "-fopenmp"], "thread": ["-fsanitize=thread"]}
RUNTIMES = {"plain": [], "address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so", "libstdc++.so"]}
MODULES = {
    "_native": sorted(ROOT.glob("csrc/cpu/*.cpp")),
    "_cuda": [ROOT / "csrc/cuda/bindings.cpp", HERE / "cuda_launch.cpp"],
}
# What takes long to compile and has nothing to do with threads is as in the plain build.
_locks: dict[Path, Lock] = {}
SINGLE = {ROOT / "csrc/cpu/avx2.cpp", ROOT / "csrc/cpu/avx512.cpp", *MODULES["_cuda"]}


def call(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run it, and end with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}\nsanitize: exit status {done.returncode}")
    return done


def build() -> None:
    """Objects and modules of all builds, but for those that are of the same sources already."""
    includes = call(sys.executable, "-m", "pybind11", "--includes").stdout.split()
    headers = b"".join(path.read_bytes() for path in sorted(ROOT.glob("csrc/**/*.h")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        linked = [
            pool.submit(compile_one, source, flags_of(name, source), includes, headers)
            for name in BUILDS
            for sources in MODULES.values()
            for source in sources
        ]
        objects = iter([each.result() for each in linked])
    for name, flags in BUILDS.items():
        (OUT / name).mkdir(parents=True, exist_ok=True)
        for module, sources in MODULES.items():
            parts = [str(next(objects)) for _ in sources]
            call(CXX, "-shared", *flags, *parts, "-o", str(OUT / name / f"{module}.so"), "-pthread")


def flags_of(name: str, source: Path) -> list[str]:
    """With which a source of a build is compiled."""
    return BUILDS["plain" if name == "thread" and source in SINGLE else name]


def compile_one(source: Path, flags: list[str], includes: list[str], headers: bytes) -> Path:
    """The object of a source, named by all that it is made of."""
    command = [CXX, *FLAGS, *flags, *includes, f"-I{ROOT / 'csrc'}"]
    digest = hashlib.sha256(headers + source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    made = OUT / f"objects/{source.parent.name}-{source.stem}-{digest}.o"
    with _locks.setdefault(made, Lock()):
        if made.exists():
            return made
        made.parent.mkdir(parents=True, exist_ok=True)
        call(*command, "-c", str(source), "-o", f"{made}.part")
        Path(f"{made}.part").replace(made)
        return made


def drive(name: str) -> tuple[list[str], list[int]]:
    """What the driver printed, and how many calls went through and were refused."""
    libraries = [call(CXX, f"-print-file-name={library}").stdout.strip() for library in RUNTIMES[name]]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",  # so that the sanitizers see each of Python's allocations, too
        "PYTHONDONTWRITEBYTECODE": "1",
        # What Python itself leaves at its end is not ours; the driver looks for what grows.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [sys.executable, str(HERE / "driver.py"), str(OUT / name)]
    if name == "thread" and shutil.which("setarch") and _may_fix_addresses():  # on some kernels it has to
        command = ["setarch", platform.machine(), "-R", *command]
    done = call(*command, env=environment, timeout=900)
    if "Sanitizer" in done.stderr or "runtime error" in done.stderr:
        sys.exit(f"{done.stderr}\nsanitize: a report of the build {name!r}")
    *_, counts = done.stderr.splitlines()
    return done.stdout.splitlines(), [int(n) for n in counts.split()[1:]]


def _may_fix_addresses() -> bool:
    return subprocess.run(["setarch", platform.machine(), "-R", "true"], capture_output=True).returncode == 0


def main() -> None:
    """Build, drive, compare."""
    start = time.monotonic()
    build()
    print(f"sanitize: built in {time.monotonic() - start:.0f} s", flush=True)
    calls = refused = 0
    expected: list[str] = []
    for name in BUILDS:
        lines, counts = drive(name)
        calls, refused = calls + counts[0], refused + counts[1]
        expected = expected or lines
        for line, wanted in zip(lines, expected, strict=True):
            if line != wanted:
                sys.exit(f"sanitize: the build {name!r} has other bits than the plain one:\n{line}\n{wanted}")
        print(f"sanitize: {name}: {len(lines)} kinds of calls agree, {time.monotonic() - start:.0f} s", flush=True)
    print(f"sanitize: {calls} calls, {refused} refused calls, 0 reports")


if __name__ == "__main__":
    main()
