"""What a run leaves behind in its folder, from which it can be resumed, replayed and used.

config.json, start/ (all that the pretrained model does not hold: head, labels), trajectory.zo, metrics.jsonl; when it
has finished also curves.png and model/. While a process writes it, run.lock (`claims`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import zo_kernels as zo
from zo_kernels import files
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.folders import schema
from zo_kernels.finetune.tasks import TASKS

CONFIG, METRICS, CURVES, MODEL = "config.json", "metrics.jsonl", "curves.png", "model"
START, TRAJECTORY = "start", "trajectory.zo"
LABELS = "labels.json"  # written last of START and of MODEL: whoever finds it finds all
FORMAT = 1  # of a folder's files
_ALWAYS_SET = {"out", "method", "lr", "eps", "steps", "batch_size", "seed"}  # in folders from before they were marked
_MODEL_KINDS = ("causal", "masked")
_MOST_TOKENS = 2**31


def marked(values: Mapping[str, Any]) -> dict[str, Any]:
    """With what tells a folder of ours, of a run or a sweep."""
    return {"zo_kernels": zo.__version__, "format": FORMAT, **values}


def unmarked(path: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """What was marked; None if nothing but the mark is there: a run is being replaced, or was until it was killed.

    Raises ValueError if it is of a later version, or not ours.
    """
    by, format = values.pop("zo_kernels", None), values.pop("format", None)
    if (by, format) == (None, None):  # of a version that left no mark
        return values
    if not isinstance(by, str) or isinstance(format, bool) or not isinstance(format, int):
        raise ValueError(f"{path}: zo_kernels, format: expected a version and a number, got {by!r:.40}, {format!r:.40}")
    if format != FORMAT:
        raise ValueError(f"{path}: format: expected {FORMAT}, got {format!r:.20}, of zo_kernels {by!r:.40}")
    return values or None


def is_run(folder: Path) -> bool:
    """Whether it is recognisably the folder of a run of ours: its settings are marked, or all that are there are
    known, and those that no run is without are among them. Raises ValueError or OSError if they cannot be read.
    """
    path = folder / CONFIG
    if not os.path.lexists(path):
        return False
    values = unmarked(path, schema.read_json(path))
    return values is None or _ALWAYS_SET <= values.keys() <= get_type_hints(Config).keys()


def config_of(run: str | Path) -> Config:
    """The settings that a run was started with, `out` being where its folder is now.

    Raises ValueError if the folder has none.
    """
    path = Path(run) / CONFIG
    try:
        values = unmarked(path, schema.read_json(path))
    except FileNotFoundError as error:
        if Path(run).is_dir():
            raise ValueError(
                f"{run}: expected the folder of a run, got one without {CONFIG}: no run has begun in it"
            ) from None
        raise ValueError(f"{run}: expected the folder of a run, with its {CONFIG}: {error}") from error
    except OSError as error:
        raise ValueError(f"{run}: expected the folder of a run, with its {CONFIG}: {error}") from error
    if values is None:
        raise ValueError(
            f"{run}: expected the folder of a run, got one in which another was being replaced: no run has begun in it"
        )
    hints = get_type_hints(Config)
    settings = schema.check(str(path), values, hints, optional=hints.keys() - _ALWAYS_SET)
    try:
        return Config(**{**settings, "out": str(run)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_config(folder: Path, config: Config | None) -> None:
    """None for the mark alone: what is in the folder is about to be replaced."""
    write_json(folder / CONFIG, marked({} if config is None else dataclasses.asdict(config)))


def started(folder: Path) -> bool:
    """Whether a run's settings are in it. Raises ValueError or OSError if they cannot be read."""
    path = folder / CONFIG
    return os.path.lexists(path) and unmarked(path, schema.read_json(path)) is not None


def begun(folder: Path) -> bool:
    """Whether the run's start is recorded in it."""
    return os.path.lexists(folder / START / LABELS)


def finished(folder: Path) -> bool:
    """Whether the run has saved its model."""
    return os.path.lexists(folder / MODEL / LABELS)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a run says of its model; the last three only if it was learned with prompts."""

    names: tuple[str, ...]
    max_tokens: int
    max_new_tokens: int | None = None
    task: str | None = None
    kind: str | None = None


def write_description(folder: Path, about: Description) -> None:
    """To START or MODEL, when all else is there: its weights' sizes and checksums go with it."""
    values = {name: value for name, value in dataclasses.asdict(about).items() if value is not None}
    weights = {path.name: _checksum(path) for path in sorted(folder.glob("*.safetensors"))}
    write_json(folder / LABELS, {**values, "weights": weights})


def read_description(folder: Path) -> Description:
    """Of START or MODEL, whose weights are checked.

    Raises:
        OSError: it cannot be read.
        ValueError: something in it is damaged; the message says what.
    """
    path = folder / LABELS
    hints = {**get_type_hints(Description), "weights": dict}
    values = schema.check(str(path), schema.read_json(path), hints, hints.keys() - {"names", "max_tokens"})
    weights = values.pop("weights", {})  # versions before did not have them
    about = Description(**values)
    for name in ("max_tokens", "max_new_tokens"):
        value = getattr(about, name)
        if value is not None and not 0 < value < _MOST_TOKENS:
            raise ValueError(f"{path}: {name}: expected a whole number from 1 to below {_MOST_TOKENS}, got {value}")
    if not about.names:
        raise ValueError(f"{path}: names: expected the names of labels, got none")
    if about.task is not None and (about.task not in TASKS or about.kind not in _MODEL_KINDS):
        raise ValueError(
            f"{path}: task, kind: expected one of {', '.join(TASKS)} and one of {', '.join(_MODEL_KINDS)}, got "
            f"{about.task!r:.40} and {about.kind!r:.40}"
        )
    if about.task is not None and about.max_new_tokens is None:
        raise ValueError(f"{path}: max_new_tokens: expected a whole number, got no such field")
    for name, expected in weights.items():
        if re.fullmatch(r"[\w.-]+\.safetensors", name) is None:
            raise ValueError(f"{path}: weights: expected names of files, got {name!r:.80}")
        schema.check_file(folder / name)
        if (got := _checksum(folder / name)) != expected:
            again = f"; delete {folder}, which --resume makes again" if folder.name == START else ""
            raise ValueError(f"{folder / name}: expected size and checksum {expected!r:.60}, got {got}: damaged{again}")
    return about


def _checksum(path: Path) -> str:
    """Of a file: its size and CRC-32."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return f"{size}-{crc:08x}"


def description(run: str | Path) -> Description:
    """What a finished run says of its model.

    Raises:
        FileNotFoundError: the folder has no finished run.
        ValueError: the model is damaged.
    """
    if not finished(Path(run)):
        raise FileNotFoundError(
            f"{run}: expected the folder of a finished run, got none with {MODEL}/{LABELS}{_way_on(Path(run))}"
        )
    with model_of(run):
        return read_description(Path(run) / MODEL)


@contextmanager
def model_of(run: str | Path) -> Iterator[None]:
    """Whatever cannot be read of a finished run's model: ValueError, which says how to make it again."""
    try:
        yield
    except Exception as error:
        how = _way_on(Path(run)) or f"; if it came from a run: zo-finetune replay RUN --out DIR, not {run}"
        raise ValueError(f"{Path(run) / MODEL}: it is damaged: {error}{how}") from error


def _way_on(run: Path) -> str:
    """For a run without a model, or with a damaged one."""
    if not os.path.lexists(run / CONFIG) or not os.path.lexists(run / TRAJECTORY):
        return ""
    ended = os.path.lexists(run / CURVES)
    return (
        f"; from the trajectory it is made by: zo-finetune replay {run} --out DIR"
        if ended
        else f"; a run that was cut off goes on by: zo-finetune --resume {run}"
    )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which is at `target`, in place of what was there, when all in it is on the disk."""
    part = target.with_name(target.name + files.PART)
    discard(part)
    part.mkdir(parents=True)
    try:
        yield part
        for path in (*part.rglob("*"), part):
            files.sync_folder(path) if path.is_dir() else files.sync(path)
        discard(target)  # what is there is not whole: it has no LABELS
        os.replace(part, target)
    except BaseException:
        discard(part)  # a disk that is full gets its room back
        raise
    files.sync_folder(target.parent)


def discard(path: Path) -> None:
    """Delete a file, a folder, or a link, but not where that leads."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """All or nothing, whenever the process dies."""
    files.replace(path, (json.dumps(value, indent=2) + "\n").encode())
