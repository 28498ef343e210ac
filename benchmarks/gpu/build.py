"""Builds the extensions that are missing or do not import: python -m benchmarks.gpu.build EXTENSION..."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The CUDA extension has a runtime of its own, which may be too new for the driver.
_IMPORT = """
import sys
from importlib import import_module
module = import_module(f"zo_kernels.{sys.argv[1]}")
if not module.__file__.startswith(sys.argv[2]):  # an editable install fills in what this checkout lacks
    sys.exit(f"{module.__file__} is another checkout's")
sys.exit(module.device_error() if sys.argv[1] == "_cuda" else None)
"""


def missing(extension: str) -> str | None:
    """Why an extension cannot be used by this Python, or None. It is asked in a process of its own, which may crash."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, extension, str(ROOT)], cwd=ROOT, capture_output=True, text=True
    )
    said = done.stderr.strip().splitlines()
    return (said[-1] if said else f"exit status {done.returncode}") if done.returncode else None


def main(extensions: Sequence[str]) -> int:
    reasons = {extension: missing(extension) for extension in extensions}
    if not any(reasons.values()):
        print(f"{', '.join(extensions)}: there already")
        return 0
    for extension, reason in reasons.items():
        print(f"{extension}: {reason or 'there already'}", flush=True)
    asked = {f"ZO_KERNELS{name.upper()}": str(int(bool(reasons.get(name)))) for name in ("_native", "_cuda")}
    # --force: what is there does not import, and may be newer than its sources.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | asked).returncode
    if status:
        print(f"the build ended with {status}")
        return status
    left = {extension: reason for extension in extensions if (reason := missing(extension))}
    for extension, reason in left.items():
        print(f"{extension} was built, but: {reason}")
    if not left:
        print(f"{', '.join(extensions)}: built")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
