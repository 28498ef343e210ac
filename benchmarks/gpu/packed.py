"""gpu.tgz: all that a run has found so far, in one file."""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

NAME = "gpu.tgz"
RUN = "run.json"  # what the run was, and how its stages ended
FORMAT = "zo_kernels gpu run 1"
_LARGEST = 128 * 2**20  # of a file, before compression; a trace may be larger


class Foreign(ValueError):
    """The file is not one that a run has packed."""


def pack(folder: Path, target: Path) -> list[str]:
    """Pack a folder's files. Whoever looks at the target finds the old file or the new one, whole.

    Returns:
        The files that were left out because they are too large.
    """
    part = target.with_name(f".{target.name}.part")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    large = [path for path in files if path.stat().st_size > _LARGEST]
    with tarfile.open(part, "w:gz", compresslevel=6) as tar:
        for path in files:
            if path not in large:
                tar.add(path, str(path.relative_to(folder)), recursive=False)
    os.replace(part, target)
    return [str(path.relative_to(folder)) for path in large]


def unpack(source: Path, folder: Path) -> dict[str, Any]:
    """Unpack into a folder, and read what the run was.

    Raises:
        Foreign: it is another file, or its names would lead out of the folder; the message says what was expected.
    """
    expected = f"{source}: expected a {NAME} as `python -m benchmarks gpu --out FOLDER` packs it"
    try:
        with tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")
        run = json.loads((folder / RUN).read_text())
    except FileNotFoundError as error:
        inside = Path(error.filename or "") == folder / RUN
        raise Foreign(f"{expected}, got an archive without {RUN}" if inside else f"{expected}, found no file") from None
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise Foreign(f"{expected}, got something else: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        got = run.get("format") if isinstance(run, dict) else run
        raise Foreign(f"{expected}, in the format {FORMAT!r}, got {got!r}")
    if strange := [name for name in run["planned"] if not re.fullmatch(r"[\w-]+", str(name))]:  # files are named so
        raise Foreign(f"{expected}, got a stage {strange[0]!r}")
    return run
