"""gpu.tgz: all that a run has found so far, in one file."""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

NAME = "gpu.tgz"
RUN = "run.json"  # what was run, and how its stages ended
FORMAT = "zo_kernels gpu run 2"
_LARGEST = 128 * 2**20  # bytes of a file before compression; a trace may be larger


def pack(folder: Path, target: Path) -> list[str]:
    """Pack a folder's files. At any moment the target is the old archive or the new one, whole.

    Returns:
        The files that were left out because they are too large.
    """
    part = target.with_name(f".{target.name}.part")
    left_out = []
    with tarfile.open(part, "w:gz", compresslevel=6) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if path.stat().st_size > _LARGEST:
                left_out.append(name)
            else:
                tar.add(path, name, recursive=False)
    os.replace(part, target)
    return left_out


def unpack(source: Path, folder: Path) -> dict[str, Any]:
    """Unpack into a folder, and return what the run was.

    Raises:
        ValueError: it is another file, or its names would lead out of the folder.
    """
    expected = f"{source}: expected a {NAME} written by `python -m benchmarks gpu --out FOLDER`"
    try:
        with tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")
        run = json.loads((folder / RUN).read_text())
    except FileNotFoundError as error:
        inside = Path(error.filename or "") == folder / RUN
        raise ValueError(f"{expected}, got " + (f"an archive without {RUN}" if inside else "no file")) from None
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"{expected}, got something else: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        got = run.get("format") if isinstance(run, dict) else run
        raise ValueError(f"{expected} in the format {FORMAT!r}, got {got!r}")
    if strange := [name for name in run["planned"] if not re.fullmatch(r"[\w-]+", str(name))]:
        raise ValueError(f"{expected}, got a stage {strange[0]!r}, which cannot name a file")
    return run
