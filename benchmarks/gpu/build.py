"""Builds the extensions that are missing or cannot be imported: python -m benchmarks.gpu.build EXTENSION..."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from .process import ROOT

# The CUDA extension brings its own runtime, which may be too new for the driver.
_IMPORT = """
import sys
from importlib import import_module
module = import_module(f"zo_kernels.{sys.argv[1]}")
if not module.__file__.startswith(sys.argv[2]):  # an editable install fills in what this checkout lacks
    sys.exit(f"{module.__file__} is another checkout's")
sys.exit(module.device_error() if sys.argv[1] == "_cuda" else None)
"""


def missing(extension: str) -> str | None:
    """Why this Python cannot use an extension, or None. Another process imports it, since that may crash."""
    command = [sys.executable, "-c", _IMPORT, extension, str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return said[-1] if done.returncode else None


def main(extensions: Sequence[str]) -> int:
    reasons = {extension: missing(extension) for extension in extensions}
    for extension, reason in reasons.items():
        print(f"{extension}: {reason or 'there already'}", flush=True)
    if not any(reasons.values()):
        return 0
    asked = {f"ZO_KERNELS{name.upper()}": str(int(bool(reasons.get(name)))) for name in ("_native", "_cuda")}
    # --force: an extension that cannot be imported may still be newer than its sources.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    if status := subprocess.run(command, cwd=ROOT, env=os.environ | asked).returncode:
        print(f"the build ended with exit status {status}")
        return status
    left = {extension: reason for extension in extensions if (reason := missing(extension))}
    for extension in extensions:
        print(f"{extension} was built, but: {left[extension]}" if extension in left else f"{extension}: built")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
