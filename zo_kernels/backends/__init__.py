"""The backends of the primitive, and the choice of one.

Without a name, the tensors' device decides. Nothing falls back: a backend that cannot run is an error that says why.
"""

from __future__ import annotations

import importlib
from typing import cast

from torch import device

from .native import Native
from .types import Backend

NAMES = ("reference", "native", "native:avx512", "native:avx2", "native:scalar", "triton", "cuda")
_DEFAULT = {"cpu": "native", "cuda": "triton"}


def _load(name: str) -> Backend:
    if name.startswith("native"):
        return Native(name.partition(":")[2] or None)
    return cast(Backend, importlib.import_module(f".{name}", __name__))


def resolve(name: str | None, where: device) -> Backend:
    """The backend for tensors on `where`.

    Args:
        name: one of NAMES, or None to choose by the device.

    Raises:
        TypeError: name is not a string.
        ValueError: the name is unknown, or that backend cannot run here on that device (the message says why).
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: expected None or one of {', '.join(NAMES)}, got {type(name).__name__}")
    if name is None:
        name = _DEFAULT.get(where.type)
        if name is None:
            raise ValueError(f"backend: no backend serves the device {where}; got backend=None")
    elif name not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {name!r}")
    backend = _load(name)
    if reason := backend.unavailable(where):
        raise ValueError(f"backend: {name!r} cannot run here: {reason}")
    return backend


def available(where: device) -> list[str]:
    """The names of all backends that can run on a device here."""
    return [name for name in NAMES if _load(name).unavailable(where) is None]
