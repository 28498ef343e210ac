"""A trajectory that grows with a run, in memory and, if wanted, in an append-only file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .trajectory import Trajectory


class Recorder:
    """Appends to a trajectory, and to its file with one write for each record.

    What was written survives the death of the process; it is forced to the disk when the system likes. A file that
    somebody else has changed meanwhile is left alone: RuntimeError.
    """

    def __init__(self) -> None:
        self.trajectory = Trajectory()
        self._path: Path | None = None
        self._written = 0
        self._fresh = True

    def write_to(self, path: str | Path) -> None:
        """From now on, and with all that there is so far.

        Args:
            path: a file that does not exist yet; made with the first record.

        Raises:
            TypeError: it is no path.
            ValueError: it exists.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"trajectory: expected a path, got {type(path).__name__}")
        if os.path.exists(path):
            raise ValueError(
                f"trajectory: expected a new file, got {path}, which exists; `resume` goes on from where it ends"
            )
        self._path, self._written, self._fresh = Path(path), 0, True
        if self.trajectory.setups:
            self.write()

    @property
    def path(self) -> Path | None:
        """Of its file, if there is one."""
        return self._path

    @classmethod
    def resumed(cls, path: str | Path | None, trajectory: Trajectory) -> Recorder:
        """Go on with a file of which `trajectory` is the sound beginning; the rest of it is cut off. None: no file."""
        recorder = cls()
        recorder.trajectory = trajectory
        if path is None:
            return recorder
        recorder._path, recorder._fresh = Path(path), False
        recorder._written = len(trajectory.to_bytes())
        if recorder._written > os.path.getsize(path):  # not even its first bytes were whole
            recorder._written = 0
        os.truncate(path, recorder._written)
        return recorder

    def write(self) -> None:
        """Write what the file lacks; what a full disk left out comes with the next record."""
        if self._path is None or self._written == self.trajectory.nbytes:
            return
        flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if self._fresh else 0)
        file = os.open(self._path, flags | getattr(os, "O_BINARY", 0), 0o666)
        self._fresh = False
        try:
            if (size := os.fstat(file).st_size) != self._written:
                raise RuntimeError(
                    f"{self._path}: expected the {self._written} bytes that this run wrote, got {size}: another "
                    "process writes to the same trajectory"
                )
            while data := self.trajectory.tail(self._written):
                self._written += os.write(file, data)
        finally:
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer goes its own way; two runs cannot write one file.
        return {**self.__dict__, "_path": None}
