"""The file that a trajectory grows in: open, locked and looked after by the one process that writes it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .. import files
from .faults import Fault, FaultyTrajectory
from .trajectory import Trajectory, read

SYNC = ("step", "checkpoint", "never")
_FLAGS = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)


class TrajectoryFile:
    """An open one, locked as long as it is open. A process that was forked off the one that opened it writes nothing.

    Args:
        path: of it.
        new: whether it may be made.

    Raises:
        BlockingIOError: another process writes it.
        OSError: it cannot be opened for writing.
    """

    def __init__(self, path: str | Path, *, new: bool):
        self.path = Path(path)
        self._place = os.path.abspath(path)  # wherever the process goes
        self._process = os.getpid()
        self._open(os.O_CREAT if new else 0)

    def _open(self, more: int) -> None:
        self._file = os.open(self._place, _FLAGS | more, 0o666)
        try:
            self._is = os.fstat(self._file)
            if not stat.S_ISREG(self._is.st_mode):
                raise OSError(f"{self.path}: expected a file, got something else")
            if not files.lock(self._file):
                raise BlockingIOError(f"{self.path}: another process writes this trajectory; end it, or wait for it")
        except BaseException:
            os.close(self._file)
            raise

    def _is_open(self) -> bool:
        """Whether the descriptor is still the file's: a process that becomes a daemon closes all that it has, and the
        next file that it opens takes the number.
        """
        try:
            return os.path.samestat(os.fstat(self._file), self._is)
        except OSError:
            return False

    def read(self, start: int = 0) -> bytes:
        """What it holds from a byte on."""
        os.lseek(self._file, start, os.SEEK_SET)
        parts = []
        while part := os.read(self._file, 2**24):
            parts.append(part)
        return b"".join(parts)

    def check(self, trajectory: Trajectory, written: int) -> int:
        """How many bytes of the trajectory it holds, of which `written` are known to be there.

        Raises:
            RuntimeError: it is not the file that this process wrote, any more.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.path}: process {self._process} writes this trajectory, which this one was forked off; "
                "record_to(another path) here"
            )
        try:
            there = os.stat(self._place)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, self._is):
            raise RuntimeError(
                f"{self.path}: the file that this run wrote was deleted or moved"
                f"{'' if there is None else ', and another one is in its place'}; record_to(another path) writes all "
                "steps so far and goes on there"
            )
        if not self._is_open():
            files.forget(self._file)
            self._open(0)
        if not files.lock(self._file):
            raise RuntimeError(f"{self.path}: another process writes to the same trajectory, and has locked it")
        size = there.st_size
        if size == written:
            return written
        # Bytes may have been written before a signal kept us from noting it.
        if size > written and trajectory.tail(written).startswith(self.read(written)):
            return size
        raise RuntimeError(
            f"{self.path}: expected the {written} bytes that this run wrote, got {size}: another process writes to the "
            "same trajectory, or another optimizer of this one, or somebody cut it; record_to(another path) writes all "
            "steps so far and goes on there"
        )

    def append(self, data: bytes) -> int:
        """Write what there is room for, and return how much that was."""
        return os.write(self._file, data)

    def cut(self, size: int) -> None:
        """To its first bytes."""
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        """Force it to the disk."""
        if os.getpid() == self._process:
            os.fsync(self._file)

    def sync_folder(self) -> None:
        """Force its name to the disk."""
        files.sync_folder(Path(self._place).parent)

    def close(self) -> None:
        """Give it up."""
        if self._is_open():
            files.close(self._file)
        else:
            files.forget(self._file)


class FoundFile:
    """One that a run is to go on with: open, locked and read. It stays as it was until `cut`.

    Args:
        path: of it.
        recover: whether to take the longest sound beginning, if more is wrong with it than an incomplete last record.

    Attributes:
        trajectory: what of it is sound.

    Raises:
        FaultyTrajectory: more is wrong with it.
        BlockingIOError: another process writes it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | Path, recover: bool):
        self.file = TrajectoryFile(path, new=False)
        self._aside: Path | None = None
        self._fault: Fault | None = None
        self._begun = self._given = False  # it is cut, and somebody else's
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
        """Whether its first bytes are those of a trajectory."""
        return self._sound > 0

    def set_aside(self) -> None:
        """Copy what is not sound to a file beside it, if it is more than an incomplete record.

        Raises:
            OSError: it cannot be written; nothing has changed.
        """
        if self._fault is not None:
            aside = files.unused(self.file.path, "damaged")
            files.replace(aside, memoryview(self._data)[self._sound :])
            self._aside = aside

    def cut(self, size: int, *, sync: bool) -> TrajectoryFile:
        """To the bytes that the run goes on from. Closing it is up to whoever gets it."""
        self._begun = True
        self.file.cut(size)
        if sync or self._aside is not None:
            self.file.sync()
            self.file.sync_folder()
        self._given, self._data = True, b""
        return self.file

    def told(self) -> str | None:
        """What was set aside, for a warning."""
        if self._fault is None:
            return None
        steps = f"{'' if self._fault.exact else 'about '}{self._fault.steps}"
        return (
            f"resume: {self.file.path} is damaged, or of a newer version, from byte {self._fault.byte} on "
            f"({self._fault.reason}); {steps} steps are gone from the run, which goes on after step "
            f"{self.trajectory.steps}; what is not used of the file is in {self._aside}"
        )

    def close(self) -> None:
        """Leave it as it was, unless it was cut."""
        if self._aside is not None and not self._begun:
            self._aside.unlink(missing_ok=True)
        if not self._given:
            self.file.close()
