"""Files that a killed process or a power cut leaves whole, and that two processes do not write at the same time."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

_fcntl: Any
_msvcrt: Any
try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None
try:
    import msvcrt as _msvcrt
except ImportError:
    _msvcrt = None

PART = ".part"  # ends the name of a file until it is whole
_BEYOND = 2**62  # a byte that no file has: Windows keeps others from reading what is locked
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)


def replace(path: str | Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file, or another one in its place: whenever the process is killed or the power is cut, there is the old
    one or the new one, whole. A link stays one, and its target is written. If it fails, nothing has changed.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():  # a device, a pipe: nothing to be replaced
        target.write_bytes(data)
        return
    # Not by the number of the process, which another one on another machine, or in another container, may have, too.
    part = target.with_name(f"{target.name[:40]}.{secrets.token_hex(4)}{PART}")
    try:
        with open(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb"
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            before = target.stat()
            if hasattr(os, "chown") and before.st_uid != os.getuid():
                with suppress(OSError):  # who may not give it away keeps it
                    os.chown(part, before.st_uid, before.st_gid)
            shutil.copymode(target, part)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync(path: str | Path) -> None:
    """Force a file's contents to the disk."""
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(path: str | Path) -> None:
    """Force the names of its files to the disk, where that can be done: Windows has no such call, some file systems do
    without, and a folder that may be written to need not be readable.
    """
    if os.name != "posix":
        return
    try:
        sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def unused(path: str | Path, word: str) -> Path:
    """`path` with "." + word + "-1" behind it, or the first number that no file has."""
    return next(p for n in itertools.count(1) if not os.path.lexists(p := Path(f"{path}.{word}-{n}")))


_locked: dict[int, int] = {}  # descriptor -> process: one that is forked off has the descriptors, and no locks


def read(path: str | Path) -> bytes:
    """What a file holds. That it is closed again takes no lock from this process, as it would by POSIX."""
    try:
        return Path(path).read_bytes()
    finally:
        _lock_again()


def close(file: int) -> None:
    """Close an open file that may have been locked; others that this process has locked stay so."""
    forget(file)
    os.close(file)
    _lock_again()


def forget(file: int) -> None:
    """That an open file was locked: the number is another one's now."""
    _locked.pop(file, None)


def _lock_again() -> None:
    for file, process in list(_locked.items()):
        if process == os.getpid():
            with suppress(OSError):
                lock(file)


def lock(file: int) -> bool:
    """Keep other processes from locking an open file; False if one has it. The system gives the lock up when the
    process ends, however it ends: there are no stale ones. In one process it can be had again and again, and is given
    up when any descriptor of that file is closed (but by `read`).
    """
    try:
        if _fcntl is not None:
            _fcntl.lockf(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        elif _msvcrt is not None:
            at = os.lseek(file, 0, os.SEEK_CUR)
            os.lseek(file, _BEYOND, os.SEEK_SET)
            try:
                _msvcrt.locking(file, _msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file, at, os.SEEK_SET)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"this file system has no locks ({error.strerror}): two processes that write one run are not kept apart",
            stacklevel=2,
        )
    _locked[file] = os.getpid()
    return True


class Locked:
    """That no other process, and nobody else in this one, holds the same file; a context manager.

    The file is made if need be, holds the number of the process, and is gone again at the end. One that a killed
    process left behind keeps nobody out.

    Args:
        path: of the lock's own file.
        told: what to say to the second, before the number of the process that has it.

    Raises:
        BlockingIOError: it is held.
        OSError: the file cannot be made.
    """

    _held: ClassVar[set[tuple[int, str]]] = set()  # process, since one that is forked off it holds none, and path

    _holds = False

    def __init__(self, path: str | Path, told: str):
        self._path = os.path.realpath(path)
        self._key = os.getpid(), self._path
        if self._key in self._held:
            raise BlockingIOError(f"{told}: process {os.getpid()}, this one")
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not lock(self._file):
                    owner = os.read(self._file, 32).decode(errors="replace").strip()
                    raise BlockingIOError(f"{told}: process {owner or 'unknown'}; wait for it, or end it")
                if self._is_there():
                    break
            except BaseException:
                self._close()
                raise
            self._close()  # whoever had it has just taken it away
        self._held.add(self._key)
        self._holds = True
        with suppress(OSError):  # a full disk; the number is there to be told alone
            os.ftruncate(self._file, 0)
            os.write(self._file, f"{os.getpid()}\n".encode())

    def _close(self) -> None:
        close(self._file)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give it up."""
        if self._holds:
            self._holds = False
            self._held.discard(self._key)
            if self._key[0] == os.getpid() and os.name == "posix":  # not another's; and Windows removes no open file
                Path(self._path).unlink(missing_ok=True)
            self._close()

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> Locked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
