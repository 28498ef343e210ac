"""Records a run: a trajectory that grows in memory and, if there is one, in an append-only, locked file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from .. import files
from .faults import Fault, FaultyTrajectory
from .trajectory import Trajectory, read

SYNC = ("step", "checkpoint", "never")
_FLAGS = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)


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


class TrajectoryFile:
    """An open trajectory file, locked as long as it is open. Only the process that opened it may write, no fork of it.

    Args:
        path: the file's path.
        new: whether to create the file if it does not exist.

    Raises:
        BlockingIOError: another process writes the file.
        OSError: it cannot be opened for writing.
    """

    def __init__(self, path: str | Path, *, new: bool):
        self.path = Path(path)
        self._place = os.path.abspath(path)  # valid even if the process changes its folder
        self._process = os.getpid()
        self._open(os.O_CREAT if new else 0)

    def _open(self, more: int) -> None:
        self._file = os.open(self._place, _FLAGS | more, 0o666)
        try:
            self._is = os.fstat(self._file)
            if not stat.S_ISREG(self._is.st_mode):
                raise OSError(f"{self.path}: expected a regular file, got a folder or a device")
            if not files.lock(self._file):
                raise BlockingIOError(
                    f"{self.path}: another process writes this trajectory; end it, or wait until it ends"
                )
        except BaseException:
            os.close(self._file)
            raise

    def _is_open(self) -> bool:
        """Whether the descriptor still belongs to the file.

        A process that becomes a daemon closes all of its descriptors, and the next file that it opens may get this one.
        """
        try:
            return os.path.samestat(os.fstat(self._file), self._is)
        except OSError:
            return False

    def read(self, start: int = 0) -> bytes:
        """Read the file from byte `start` to its end."""
        os.lseek(self._file, start, os.SEEK_SET)
        parts = []
        while part := os.read(self._file, 2**24):
            parts.append(part)
        return b"".join(parts)

    def check(self, trajectory: Trajectory, written: int) -> int:
        """Check that the file is still the one that this process wrote.

        Args:
            trajectory: what the file should hold.
            written: how many bytes of it are known to have been written.

        Returns:
            How many bytes of the trajectory the file holds.

        Raises:
            RuntimeError: the file was deleted, moved, replaced or changed, or belongs to another process.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.path}: process {self._process} writes this trajectory, and this process is a fork of it; call "
                "record_to(another_path) here"
            )
        try:
            there = os.stat(self._place)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, self._is):
            raise RuntimeError(
                f"{self.path}: the file that this run wrote was deleted or moved"
                f"{'' if there is None else ', and another file took its place'}; record_to(another_path) writes all "
                "steps so far and continues there"
            )
        if not self._is_open():
            files.forget(self._file)
            self._open(0)
        if not files.lock(self._file):
            raise RuntimeError(f"{self.path}: another process writes to the same trajectory, and has locked it")
        size = there.st_size
        if size == written:
            return written
        # A signal may have come after bytes were written and before they were counted.
        if size > written and trajectory.tail(written).startswith(self.read(written)):
            return size
        raise RuntimeError(
            f"{self.path}: expected the {written} bytes that this run wrote, got {size}: another process writes to the "
            "same trajectory, or another optimizer does, or the file was cut; record_to(another_path) writes all "
            "steps so far and continues there"
        )

    def append(self, data: bytes) -> int:
        """Append bytes; return how many were written, which may be fewer if the disk is full."""
        return os.write(self._file, data)

    def cut(self, size: int) -> None:
        """Cut the file to its first `size` bytes."""
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        """Force its contents to the disk."""
        if os.getpid() == self._process:
            os.fsync(self._file)

    def sync_folder(self) -> None:
        """Force its name to the disk."""
        files.sync_folder(Path(self._place).parent)

    def close(self) -> None:
        """Close and unlock the file."""
        if self._is_open():
            files.close(self._file)
        else:
            files.forget(self._file)


class FoundFile:
    """The file of a run that is to be continued: open, locked and read, but unchanged until `cut`.

    Args:
        path: the file's path.
        recover: whether to keep the longest sound beginning if the file has more faults than an incomplete last record.

    Attributes:
        trajectory: the sound beginning.

    Raises:
        FaultyTrajectory: the file has a fault that `recover` does not cover.
        BlockingIOError: another process writes the file.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | Path, recover: bool):
        self.file = TrajectoryFile(path, new=False)
        self._aside: Path | None = None
        self._fault: Fault | None = None
        self._begun = self._given = False  # whether cutting has begun, and whether the recorder has the file
        try:
            self._data = self.file.read()
            self.trajectory, self._sound, fault = read(self._data)
            if fault is not None and fault.kind != "incomplete":
                if not (recover and fault.recoverable):
                    raise FaultyTrajectory.of(fault, path, self.trajectory.steps)
                self._fault = fault
        except BaseException:
            self.close()
            raise

    @property
    def whole_beginning(self) -> bool:
        """Whether the file begins with all the bytes that mark a trajectory."""
        return self._sound > 0

    def set_aside(self) -> None:
        """Copy what is not sound to a file beside it; an incomplete last record is not kept.

        Raises:
            OSError: the copy cannot be written; nothing has changed.
        """
        if self._fault is not None:
            aside = files.unused(self.file.path, "damaged")
            files.replace(aside, memoryview(self._data)[self._sound :])
            self._aside = aside

    def cut(self, size: int, *, sync: bool) -> TrajectoryFile:
        """Cut the file to the first `size` bytes, from which the run continues; the caller closes the file."""
        self._begun = True
        self.file.cut(size)
        if sync or self._aside is not None:
            self.file.sync()
            self.file.sync_folder()
        self._given, self._data = True, b""
        return self.file

    def told(self) -> str | None:
        """A warning about the part that was set aside; None if there is none."""
        if self._fault is None:
            return None
        steps = f"{'' if self._fault.exact else 'about '}{self._fault.steps}"
        return (
            f"resume: {self.file.path} is damaged, or of a newer version, from byte {self._fault.byte} on "
            f"({self._fault.reason}); the run lost {steps} steps and continues after step {self.trajectory.steps}; the "
            f"part of the file that cannot be used is in {self._aside}"
        )

    def close(self) -> None:
        """Close the file, unless the recorder has it by now; remove the copy if nothing was cut."""
        if self._aside is not None and not self._begun:
            self._aside.unlink(missing_ok=True)
        if not self._given:
            self.file.close()
