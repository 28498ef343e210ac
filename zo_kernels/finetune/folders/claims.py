"""Whose a folder is: what may be written into it, by whom, and what is never touched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zo_kernels import files
from zo_kernels.finetune import ending
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.folders import run_folder

_LOCK = "run.lock"


@dataclass(frozen=True)
class Kind:
    """Of folders of ours: what they are called, their own files and folders, and how one is told."""

    name: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    is_ours: Callable[[Path], bool]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.files, *self.folders)


RUN = Kind(
    "a run",
    (run_folder.CONFIG, run_folder.TRAJECTORY, run_folder.METRICS, run_folder.CURVES),
    (run_folder.START, run_folder.MODEL),
    run_folder.is_run,
)
MODEL_ALONE = Kind("a model", (), (run_folder.MODEL,), lambda folder: False)  # what a replay makes


def sources(config: Config) -> dict[str, str | None]:
    """What a run reads: option -> file or folder."""
    names = ("model", "data", "test_data", "task_data")
    return {"--" + name.replace("_", "-"): getattr(config, name) for name in names}


def check_new(
    path: str, kind: Kind, read: Mapping[str, str | None], *, overwrite: bool = False, hint: str = ""
) -> Path:
    """The folder of `--out`, which need not be there. Nothing is changed.

    What a killed process had only begun to write is no file.

    Args:
        path: of the folder.
        kind: what is to be written into it.
        read: option -> file or folder that is read.
        overwrite: whether files of an earlier one may be replaced.
        hint: what else to say if there are files.

    Raises ValueError if it is no folder, is not empty or not recognisably of this kind, has a link in place of one of
    its files, cannot be written, or is, or is in, or holds what is read.
    """
    folder = Path(path)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {folder}")
    for option, name in read.items():
        source = Path(name) if name else None
        if source is not None and source.exists() and (_inside(folder, source) or _inside(source, folder)):
            raise ValueError(
                f"--out: expected a folder apart from what is read, got {folder}, and {option} {source}: choose another"
            )
    if folder.is_dir() and any(not _is_leftover(name, kind) for name in os.listdir(folder)):
        if not overwrite:
            raise ValueError(f"--out: expected an empty or new folder, got {folder} with files in it{hint}")
        _check_ours(folder, kind)
    check_written(folder, kind, "--out: ")
    return folder


def _check_ours(folder: Path, kind: Kind) -> None:
    try:
        ours, reason = kind.is_ours(folder), f"no {kind.files[0]} of one"
    except (OSError, ValueError) as error:
        ours, reason = False, str(error)
    if not ours:
        raise ValueError(
            f"--overwrite: expected the folder of {kind.name} of zo-finetune, got {folder} with other files in it "
            f"({reason}): choose another --out, or delete them"
        )


def check_written(folder: Path, kind: Kind, option: str = "") -> None:
    """Raise ValueError if a folder of ours, or what it is to be made in, cannot be written, or something else stands
    where one of its files should be: a link, which might lead out of it, above all.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option}expected a folder that can be written, got {folder}: {_why_not(there)}")
    inside: list[str | Path] = [Path(run_folder.START, name) for name in ("", run_folder.LABELS, "head.safetensors")]
    for name in (_LOCK, *kind.names, *inside):
        path = folder / name
        if path.is_symlink():
            raise ValueError(f"{option}expected a file or folder of its own, got {path}, a link to {os.readlink(path)}")
        if path.exists() and path.is_dir() != (str(name) in kind.folders or name == Path(run_folder.START)):
            wanted, got = ("file", "folder") if path.is_dir() else ("folder", "file")
            raise ValueError(f"{option}expected {path} to be a {wanted}, got a {got}")


def _why_not(place: Path) -> str:
    if not place.is_dir():
        return f"{place} is a file"
    if hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"the file system of {place} is read-only"
    if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
        return f"{place} is another user's"
    return f"no permission for {place}"


def _inside(inner: Path, outer: Path) -> bool:
    """Whether it is the other, or in it, by whatever names and links."""
    inner, outer = Path(os.path.realpath(inner)), Path(os.path.realpath(outer))
    if outer in (inner, *inner.parents):
        return True
    return outer.exists() and any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents))


def _is_leftover(name: str, kind: Kind) -> bool:
    """Of a process that was killed: its lock, or a file or folder that it had only begun to write."""
    own = "|".join(map(re.escape, (_LOCK, *kind.names)))
    return name == _LOCK or re.fullmatch(rf"({own})(\..+)?{re.escape(files.PART)}", name) is not None


def lock(folder: Path, kind: Kind) -> files.Locked:
    """Keep others from writing a folder of ours, and delete what a killed process left half written.

    Raises BlockingIOError if another process writes it, OSError if the lock cannot be made.
    """
    held = files.Locked(folder / _LOCK, f"{folder}: expected {kind.name} that nobody else writes, but it is held")
    ending.began(folder)
    try:
        for name in os.listdir(folder):
            if name != _LOCK and _is_leftover(name, kind):
                run_folder.discard(folder / name)
    except BaseException:
        held.release()
        raise
    return held


def claim(config: Config) -> files.Locked:
    """Make and lock the folder of a run, and write its settings into it.

    An earlier run's files are deleted; others stay.

    Raises ValueError as `check_new`, OSError as `lock`.
    """
    folder = check_run(config)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder, RUN)
    try:
        check_run(config)  # somebody else may have been faster
        clear(folder)
        run_folder.write_config(folder, config)
    except BaseException:
        held.release()
        if made and not os.listdir(folder):
            folder.rmdir()
        raise
    return held


def claim_again(folder: Path) -> files.Locked:
    """Lock the folder of a run that is gone on with.

    Raises ValueError as `check_written`, OSError as `lock`.
    """
    check_written(folder, RUN)
    return lock(folder, RUN)


def check_run(config: Config) -> Path:
    """As `check_new`, for a run."""
    hint = " (or add --overwrite)"
    return check_new(str(config.out), RUN, sources(config), overwrite=config.overwrite, hint=hint)


def clear(folder: Path) -> None:
    """Delete the files of an earlier run, if there is one. Until the settings of another are written, its folder can
    be told, and overwritten, but not resumed.
    """
    if not os.path.lexists(folder / run_folder.CONFIG):
        return
    run_folder.write_config(folder, None)
    for name in RUN.names:
        if name != run_folder.CONFIG:
            run_folder.discard(folder / name)
