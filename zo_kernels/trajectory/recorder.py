"""Records a run: a trajectory that grows in memory and, if there is one, in an append-only file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .file import FoundFile, TrajectoryFile
from .trajectory import Trajectory


class Recorder:
    """A growing trajectory and its file, which gets one write for each record.

    What was written survives if the process dies. The file stays open and locked as long as the recorder lives. If
    something else changed, replaced or removed it, `write` raises RuntimeError and leaves it alone.

    Args:
        sync: when to force the file to the disk, so that it survives a power cut, too: "step": after each record;
            "checkpoint": in `sync` and `close`; "never": when the system decides.

    Attributes:
        trajectory: all records so far.
        lost: whether `write` found that the file is no longer this run's.
    """

    lost = False

    def __init__(self, sync: str = "checkpoint") -> None:
        self.trajectory = Trajectory()
        self._path: Path | None = None
        self._file: TrajectoryFile | None = None
        self._written = 0
        self._sync = sync

    def write_to(self, path: str | Path) -> None:
        """Write to this file from now on, beginning with all records so far.

        Args:
            path: a file that does not exist yet; it is created with the first record.

        Raises:
            TypeError: `path` is no path.
            ValueError: the file exists, or its folder does not.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"trajectory: expected a path, got {type(path).__name__}")
        if os.path.lexists(path):
            raise ValueError(
                f"trajectory: {path} already exists; delete it, or continue that run with opt.resume({str(path)!r})"
            )
        if not (folder := Path(os.path.abspath(path)).parent).is_dir():
            raise ValueError(f"trajectory: expected a file in an existing folder, got {path}; create {folder} first")
        self.close()
        self._path, self._written = Path(os.path.abspath(path)), 0  # valid even if the process changes its folder
        if self.trajectory.setups:
            self.write()

    @property
    def path(self) -> Path | None:
        """The path of the file, None if there is none."""
        return self._path

    @classmethod
    def resumed(cls, found: FoundFile | None, trajectory: Trajectory, sync: str) -> Recorder:
        """Continue `trajectory`, in the file that begins with it if there is one; the rest of the file is cut off."""
        recorder = cls(sync)
        recorder.trajectory = trajectory
        if found is not None:
            size = len(trajectory.to_bytes())
            recorder._written = size if found.whole_beginning else 0
            recorder._file = found.cut(recorder._written, sync=sync != "never")
            recorder._path = recorder._file.path
        return recorder

    def write(self) -> None:
        """Write the records that the file lacks, also those that a full disk has left out before."""
        if self._path is None or not self.trajectory.setups or self._written == self.trajectory.nbytes:
            return
        if self._file is None:
            self._file = TrajectoryFile(self._path, new=True)
            if self._sync != "never":
                self._file.sync_folder()
        file = self._file
        self.lost = True  # until the check has passed
        self._written = file.check(self.trajectory, self._written)
        self.lost = False
        try:
            while data := self.trajectory.tail(self._written):
                self._written += file.append(data)
            if self._sync == "step":
                file.sync()
        except OSError as error:
            what = f"{error.strerror}; the records are kept in memory, and the next step writes those that are missing"
            raise OSError(error.errno, what, str(self._path)) from error

    def sync(self) -> None:
        """Force the file to the disk, unless `sync` is "never"."""
        if self._file is not None and self._sync != "never":
            self._file.sync()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is None:
            return
        try:
            self.sync()
        finally:
            self._file.close()
            self._path = self._file = None

    def __getstate__(self) -> dict[str, Any]:
        # A copied optimizer records without a file: two runs cannot write to one.
        return {**self.__dict__, "_path": None, "_file": None}
