"""A trajectory that grows with a run, in memory and, if wanted, in an append-only file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .file import FoundFile, TrajectoryFile
from .trajectory import Trajectory


class Recorder:
    """Appends to a trajectory, and to its file with one write for each record.

    What was written survives the death of the process. The file is open, and locked, as long as the recorder is. One
    that somebody else has changed, replaced or taken away meanwhile is left alone: RuntimeError.

    Args:
        sync: when the file is forced to the disk, so that it survives a power cut, too: "step": after each record.
            "checkpoint": by `sync` and `close`. "never": when the system likes.

    Attributes:
        lost: whether the file was found to be somebody else's, which `write` has told.
    """

    lost = False

    def __init__(self, sync: str = "checkpoint") -> None:
        self.trajectory = Trajectory()
        self._path: Path | None = None
        self._file: TrajectoryFile | None = None
        self._written = 0
        self._sync = sync

    def write_to(self, path: str | Path) -> None:
        """From now on, and with all that there is so far.

        Args:
            path: a file that does not exist yet; made with the first record.

        Raises:
            TypeError: it is no path.
            ValueError: it exists, or its folder does not.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"trajectory: expected a path, got {type(path).__name__}")
        if os.path.lexists(path):
            raise ValueError(
                f"trajectory: expected a new file, got {path}, which exists; `resume` goes on from where it ends"
            )
        if not (folder := Path(os.path.abspath(path)).parent).is_dir():
            raise ValueError(f"trajectory: expected a file in a folder that exists, got {path}; make {folder} first")
        self.close()
        self._path, self._written = Path(os.path.abspath(path)), 0  # wherever the process goes
        if self.trajectory.setups:
            self.write()

    @property
    def path(self) -> Path | None:
        """Of its file, if there is one."""
        return self._path

    @classmethod
    def resumed(cls, found: FoundFile | None, trajectory: Trajectory, sync: str) -> Recorder:
        """Go on with a file of which `trajectory` is the beginning; the rest of it is cut off. None: no file."""
        recorder = cls(sync)
        recorder.trajectory = trajectory
        if found is not None:
            size = len(trajectory.to_bytes())
            recorder._written = size if found.whole_beginning else 0
            recorder._file = found.cut(recorder._written, sync=sync != "never")
            recorder._path = recorder._file.path
        return recorder

    def write(self) -> None:
        """Write what the file lacks; what a full disk left out comes with the next record."""
        if self._path is None or not self.trajectory.setups or self._written == self.trajectory.nbytes:
            return
        if self._file is None:
            self._file = TrajectoryFile(self._path, new=True)
            if self._sync != "never":
                self._file.sync_folder()
        file = self._file
        self.lost = True  # should it be somebody else's now
        self._written = file.check(self.trajectory, self._written)
        self.lost = False
        try:
            while data := self.trajectory.tail(self._written):
                self._written += file.append(data)
            if self._sync == "step":
                file.sync()
        except OSError as error:
            what = f"{error.strerror}; what was recorded is in memory, and the next step writes what is missing"
            raise OSError(error.errno, what, str(self._path)) from error

    def sync(self) -> None:
        """Force what was written to the disk, unless that is never to be done."""
        if self._file is not None and self._sync != "never":
            self._file.sync()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is None:
            return
        try:
            self.sync()
        finally:
            self._file.close()
            self._path = self._file = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer goes its own way; two runs cannot write one file.
        return {**self.__dict__, "_path": None, "_file": None}
