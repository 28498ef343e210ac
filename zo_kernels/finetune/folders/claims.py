"""Who may write into a folder: checks before anything is written, and locks while it is written.

Files that are not of zo-finetune are never touched.
"""

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
    """A kind of folder that zo-finetune writes: its name, its files and folders, and how to recognise it."""

    name: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    is_ours: Callable[[Path], bool]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.files, *self.folders)


RUN = Kind(
    "a run",
    (run_folder.CONFIG, run_folder.TRAJECTORY, run_folder.METRICS, run_folder.RATES, run_folder.CURVES),
    (run_folder.START, run_folder.MODEL),
    run_folder.is_run,
)
MODEL_ALONE = Kind("a model", (), (run_folder.MODEL,), lambda folder: False)  # written by `zo-finetune replay`


def sources(config: Config) -> dict[str, str | None]:
    """The files and folders that a run reads: option -> path."""
    names = ("model", "data", "test_data", "task_data")
    return {"--" + name.replace("_", "-"): getattr(config, name) for name in names}


def check_new(
    path: str, kind: Kind, read: Mapping[str, str | None], *, overwrite: bool = False, hint: str = ""
) -> Path:
    """Check the folder of `--out`, which need not exist, and return it. Nothing is changed.

    Files that a killed process had only begun to write do not count.

    Args:
        path: the folder.
        kind: what will be written into it.
        read: option -> file or folder that is read.
        overwrite: whether files of an earlier folder of this kind may be replaced.
        hint: added to the message if the folder is not empty.

    Raises ValueError if the path is not a folder, the folder is not empty (with `overwrite`: is not of this kind), has
    a link in place of one of its files, cannot be written, or overlaps with what is read.
    """
    folder = Path(path)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {folder}")
    for option, name in read.items():
        source = Path(name) if name else None
        if source is not None and source.exists() and (_inside(folder, source) or _inside(source, folder)):
            raise ValueError(
                f"--out: expected a folder apart from the data and the model, got {folder}, which overlaps with "
                f"{option} {source}: choose another folder"
            )
    if folder.is_dir() and any(not _is_leftover(name, kind) for name in os.listdir(folder)):
        if not overwrite:
            raise ValueError(f"--out: expected an empty or new folder, got {folder} with files in it{hint}")
        _check_ours(folder, kind)
    check_written(folder, kind, "--out: ")
    return folder


def _check_ours(folder: Path, kind: Kind) -> None:
    try:
        ours, reason = kind.is_ours(folder), f"it has no {kind.files[0]} of zo-finetune"
    except (OSError, ValueError) as error:
        ours, reason = False, str(error)
    if not ours:
        raise ValueError(
            f"--overwrite: expected the folder of {kind.name} of zo-finetune, got {folder} with other files in it "
            f"({reason}): choose another --out, or delete the files"
        )


def check_written(folder: Path, kind: Kind, option: str = "") -> None:
    """Raise ValueError if a folder, or the place to create it in, cannot be written.

    Also if something else is in place of one of its files, above all a link, which might lead out of the folder.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option}expected a folder that can be written, got {folder}: {_why_not(there)}")
    inside: list[str | Path] = [Path(run_folder.START, name) for name in ("", run_folder.LABELS, "head.safetensors")]
    for name in (_LOCK, *kind.names, *inside):
        path = folder / name
        if path.is_symlink():
            raise ValueError(f"{option}expected a real file or folder, got {path}, a link to {os.readlink(path)}")
        if path.exists() and path.is_dir() != (str(name) in kind.folders or name == Path(run_folder.START)):
            wanted, got = ("file", "folder") if path.is_dir() else ("folder", "file")
            raise ValueError(f"{option}expected {path} to be a {wanted}, got a {got}")


def _why_not(place: Path) -> str:
    if not place.is_dir():
        return f"{place} is a file"
    if hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"the file system of {place} is read-only"
    if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
        return f"{place} belongs to another user"
    return f"no permission to write to {place}"


def _inside(inner: Path, outer: Path) -> bool:
    """Whether a path is another path or lies inside it, under any names and links."""
    inner, outer = Path(os.path.realpath(inner)), Path(os.path.realpath(outer))
    if outer in (inner, *inner.parents):
        return True
    return outer.exists() and any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents))


def _is_leftover(name: str, kind: Kind) -> bool:
    """Whether a killed process left this: its lock, or a file or folder that it had only begun to write."""
    own = "|".join(map(re.escape, (_LOCK, *kind.names)))
    return name == _LOCK or re.fullmatch(rf"({own})(\..+)?{re.escape(files.PART)}", name) is not None


def lock(folder: Path, kind: Kind) -> files.Locked:
    """Lock a folder against other processes, and delete what a killed process left half written.

    Raises BlockingIOError if another process holds the lock, OSError if the lock cannot be made.
    """
    held = files.Locked(folder / _LOCK, f"{folder}: expected {kind.name} that no other process writes, but it is held")
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
    """Create and lock the folder of a run, and write the settings into it.

    The files of an earlier run are deleted; other files stay.

    Raises the ValueError of `check_new` and the OSError of `lock`.
    """
    folder = check_run(config)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder, RUN)
    try:
        check_run(config)  # another process may have been faster
        clear(folder)
        run_folder.write_config(folder, config)
    except BaseException:
        held.release()
        if made and not os.listdir(folder):
            folder.rmdir()
        raise
    return held


def claim_again(folder: Path) -> files.Locked:
    """Lock the folder of a run that is resumed.

    Raises the ValueError of `check_written` and the OSError of `lock`.
    """
    check_written(folder, RUN)
    return lock(folder, RUN)


def check_run(config: Config) -> Path:
    """`check_new` for the folder of a run."""
    hint = " (or add --overwrite)"
    return check_new(str(config.out), RUN, sources(config), overwrite=config.overwrite, hint=hint)


def clear(folder: Path) -> None:
    """Delete the files of an earlier run, if there is one.

    Until new settings are written, the folder is still recognised and may be overwritten, but not resumed.
    """
    if not os.path.lexists(folder / run_folder.CONFIG):
        return
    run_folder.write_config(folder, None)
    for name in RUN.names:
        if name != run_folder.CONFIG:
            run_folder.discard(folder / name)
