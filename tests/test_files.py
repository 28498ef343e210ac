"""Files that are replaced are the old one or the new one, whole; and one process at a time holds a lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zo_kernels import files

POSIX = pytest.mark.skipif(os.name != "posix", reason="this system has no fork")
OPERATIONS = ("open", "write", "fsync", "replace", "chmod", "unlink")  # of `os`, in `replace`


def forked(do: Callable[[], Any]) -> int:
    """What a process that does it ends with: 0, the number of an error if it raised one, or minus a signal's."""
    child = os.fork()
    if child == 0:
        try:
            do()
        except OSError as error:
            os._exit(error.errno or 1)
        except BaseException:
            os._exit(255)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_operation(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], None]) -> None:
    """Do it in place of the so-and-so-many-th operation on a file."""
    count = iter(range(1, 1000))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if next(count) == number:
                do()
            return real(*args, **options)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@POSIX
@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("end", [killed, full])
def test_a_file_is_the_old_one_or_the_new_one(old: bytes | None, end: Callable[[], None], tmp_path: Path) -> None:
    """Whichever operation is the last one, or fails."""
    seen = set()
    for number in range(1, 20):
        folder = tmp_path / str(number)
        folder.mkdir()
        if old is not None:
            (folder / "file").write_bytes(old)

        def write(number: int = number, path: Path = folder / "file") -> None:
            with pytest.MonkeyPatch.context() as patched:
                at_operation(patched, number, end)
                files.replace(path, b"new")

        code = forked(write)
        got = (folder / "file").read_bytes() if (folder / "file").exists() else None
        assert got in (old, b"new")
        seen.add(got)
        left = [p.name for p in folder.iterdir() if p.name != "file"]
        if code == 0:
            assert got == b"new" and not left
            break
        if end is full:
            assert code == errno.ENOSPC
            assert not left
        files.replace(folder / "file", b"newer")  # what a killed process left is in nobody's way
        assert (folder / "file").read_bytes() == b"newer"
    assert number > 4 and seen == {old, b"new"}


def test_replace_keeps_links_and_permissions(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / ("n" * 250)
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    files.replace(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o600
    files.replace(tmp_path / ("m" * 250), memoryview(b"a long name"))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / ("m" * 250)).stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(OSError, match="directory"):
        files.replace(tmp_path, b"")
    assert len(list(tmp_path.iterdir())) == 3


def test_unused_names(tmp_path: Path) -> None:
    assert files.unused(tmp_path / "a.zo", "damaged") == tmp_path / "a.zo.damaged-1"
    (tmp_path / "a.zo.damaged-1").symlink_to(tmp_path / "nothing")
    assert files.unused(tmp_path / "a.zo", "damaged") == tmp_path / "a.zo.damaged-2"


# Without PyTorch, which takes seconds.
HOLD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[2])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
lock = files.Locked(sys.argv[1], "no")
print()
sys.stdin.read()
"""


@POSIX
def test_one_process_holds_a_lock_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def take() -> None:
        files.Locked(path, "taken").release()

    with files.Locked(path, "taken"):
        with pytest.raises(BlockingIOError, match=f"taken: process {os.getpid()}, this one"):
            files.Locked(path, "taken")
        assert forked(take) != 0
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()
    take()
    path.write_text("999999999\n")  # a stale one
    take()
    command = [sys.executable, "-c", HOLD, str(path), files.__file__]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(BlockingIOError, match=f"taken: process {other.pid}"):
        files.Locked(path, "taken")
    other.kill()
    other.communicate()
    assert path.exists()
    take()


@POSIX
def test_a_lock_and_a_fork_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    held = files.Locked(path, "taken")
    assert forked(held.release) == 0 and path.exists()  # not the child's to give up
    held.release()
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda *_: full())
        held = files.Locked(path, "taken")
    held.release()
    with open(path, "w") as file:
        file.write("x")
    with open(path) as file, pytest.raises(OSError, match="Bad file"):
        files.lock(file.fileno())


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if files._fcntl is None:
        pytest.skip("this system has no fcntl")

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files._fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="no locks"), files.Locked(tmp_path / "lock", "taken"):
        pass


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, raises in ((errno.EINVAL, False), (errno.EIO, True)):

        def fail(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            if raises:
                with pytest.raises(OSError, match="error"):
                    files.sync_folder(tmp_path)
            else:
                files.sync_folder(tmp_path)
