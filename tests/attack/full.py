"""Disks that are full: by failing calls, or in truth, where a small one can be mounted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CALLS = ("write", "fsync", "replace", "rename", "mkdir", "link", "ftruncate")
_active: list[Failing] = []  # an audit hook stays for ever
_hooked = False


class Failing:
    """From the k-th operation that needs space on, each fails, until there is space again; a write may get a part in.

    Args:
        at: k, from 1 on; 0: none fails, and they are counted.
        once: whether the next ones work again.
        part: of what the failing write writes before.
    """

    def __init__(self, at: int, *, once: bool = False, part: float = 0.0):
        self.at, self.once, self.part = at, once, part
        self.counted = self.failed = 0
        self.free = False

    def fails(self) -> bool:
        """Counts one."""
        self.counted += 1
        if self.free or not self.at or self.counted < self.at or (self.once and self.failed):
            return False
        self.failed += 1
        return True


def _error(what: str) -> OSError:
    return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({what})")


def _audit(event: str, given: tuple[Any, ...]) -> None:
    if event != "open" or not _active or not isinstance(given[2], int) or not given[2] & os.O_CREAT:
        return
    if not str(given[0]).startswith(("/dev/", "/proc/")) and _active[-1].fails():
        raise _error("open")


@contextmanager
def full_disk(disk: Failing) -> Iterator[Failing]:
    """While the block runs."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    plain = {name: getattr(os, name) for name in _CALLS}

    def of(name: str) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            if name == "write" and given[0] in (1, 2):
                return plain[name](*given)
            if disk.fails():
                if name == "write" and (n := int(disk.part * len(given[1]))):
                    return plain[name](given[0], bytes(given[1])[:n])
                raise _error(name)
            return plain[name](*given, **options)

        return call

    for name in _CALLS:
        setattr(os, name, of(name))
    _active.append(disk)
    try:
        yield disk
    finally:
        _active.remove(disk)
        for name, function in plain.items():
            setattr(os, name, function)


def why_no_mount() -> str | None:
    """Why no small disk can be mounted here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root mounts a disk"
    place = Path("probe").absolute()
    try:
        with mounted(place, 64):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no disk can be mounted here: {error}"


@contextmanager
def mounted(place: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of that size, in memory, while the block runs."""
    place.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], check=True, capture_output=True
    )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True, capture_output=True)
        place.rmdir()


def filled(disk: Path, left: int) -> Path:
    """All but so many bytes of it, by a file."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - left)))
    return filler
