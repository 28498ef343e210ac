"""Files that stay whole if the process is killed or the power is cut, and locks that keep two processes apart."""

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

PART = ".part"  # ends the name of a file until it is complete
_BEYOND = 2**62  # an offset past every file's end: Windows keeps others from reading locked bytes
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)


def replace(path: str | Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file, or replace one, in a single step.

    Whenever the process is killed or the power is cut, the old file or the new one is there, whole. If `path` is a
    link, its target is replaced. If this fails, nothing has changed.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():  # a device or a pipe cannot be replaced
        target.write_bytes(data)
        return
    # A random name: a process on another machine, or in another container, may have the same process id.
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
                with suppress(OSError):  # without the right to change the owner, the file is this user's
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
    """Force the names of a folder's files to the disk, where the system can.

    Windows and some file systems have no such call, and a folder that may be written to need not be readable.
    """
    if os.name != "posix":
        return
    try:
        sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def unused(path: str | Path, word: str) -> Path:
    """The first of `path`.word-1, `path`.word-2, ... that does not exist."""
    return next(p for n in itertools.count(1) if not os.path.lexists(p := Path(f"{path}.{word}-{n}")))


_locked: dict[int, int] = {}  # descriptor -> process; a forked child inherits descriptors, but no locks


def read(path: str | Path) -> bytes:
    """The contents of a file.

    By POSIX, closing a file drops the process's locks on it; this takes them again.
    """
    try:
        return Path(path).read_bytes()
    finally:
        _lock_again()


def close(file: int) -> None:
    """Close an open file that may be locked, and keep this process's locks on other files."""
    forget(file)
    os.close(file)
    _lock_again()


def forget(file: int) -> None:
    """Forget that a descriptor was locked: its number belongs to another file now."""
    _locked.pop(file, None)


def _lock_again() -> None:
    for file, process in list(_locked.items()):
        if process == os.getpid():
            with suppress(OSError):
                lock(file)


def lock(file: int) -> bool:
    """Lock an open file against other processes; False if one of them has it.

    The system releases the lock when the process ends, however it ends, so no lock is ever stale. The same process can
    take it any number of times, and loses it when any descriptor of the file is closed, except by `read`.
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
            f"this file system has no locks ({error.strerror}): do not let two processes write the same run",
            stacklevel=2,
        )
    _locked[file] = os.getpid()
    return True


class Locked:
    """A lock that one holder has at a time, in this process or any other; a context manager.

    The lock's file is created if it does not exist, contains the process id of the holder, and is removed at the end. A
    file that a killed process left behind locks nobody out.

    Args:
        path: of the lock's own file.
        told: the error's first words for whoever comes second; the holder's process id follows.

    Raises:
        BlockingIOError: somebody holds it.
        OSError: the file cannot be created.
    """

    _held: ClassVar[set[tuple[int, str]]] = set()  # (process id, path): a forked child holds none of its parent's locks

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
            self._close()  # the previous holder has just removed the file
        self._held.add(self._key)
        self._holds = True
        with suppress(OSError):  # a full disk: only the message to others needs the number
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
        """Release the lock."""
        if self._holds:
            self._holds = False
            self._held.discard(self._key)
            # A forked child does not hold the lock; Windows cannot remove an open file.
            if self._key[0] == os.getpid() and os.name == "posix":
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
