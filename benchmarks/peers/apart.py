"""Each peer runs in a process of its own: what it imports, patches and seeds reaches nobody else.

`python -m benchmarks.peers.apart SPEC FILE` measures what the JSON text SPEC says, and writes its rows to FILE.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from ..bench.registry import Row
from .adapters import PEERS
from .measure import first_step, measure
from .peer import Unavailable
from .spec import Spec

_ROOT = Path(__file__).parents[2]
_SHOWN = 600  # characters of what a process said before it died


def run(spec: Spec) -> list[Row]:
    """Measure in another process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, "-m", f"{__package__}.apart", json.dumps(asdict(spec)), str(file)]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip()[-_SHOWN:]
            raise RuntimeError(f"the process of {spec.peer} ended with status {done.returncode}: {said}")
        return json.loads(file.read_text())


def here(spec: Spec) -> list[Row]:
    """Measure in this process."""
    try:
        peer = PEERS[spec.peer].load(spec.checkout)
        first_step(spec, peer)
    except Unavailable as error:
        return [{"skipped": str(error)}]
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "zo_kernels", "benchmarks"):
            raise
        return [{"skipped": f"{name} is not installed"}]
    return measure(spec, peer)


if __name__ == "__main__":
    text, out = sys.argv[1:]
    Path(out).write_text(json.dumps(here(Spec(**json.loads(text))), allow_nan=False))
