"""The files of a run, from which it can be resumed, replayed and used.

config.json    the settings
start/         what the run starts with beyond the pretrained model: head and labels
trajectory.zo  every step
metrics.jsonl  every measurement
lr.png         with --lr auto: what each rate that was tried did to the loss
curves.png     loss and accuracy over the run; written at its end
model/         the trained model; written last
run.lock       there while a process writes the folder (see `claims`)
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
RATES = "lr.png"
START, TRAJECTORY = "start", "trajectory.zo"
LABELS = "labels.json"  # written last into START and MODEL: if it is there, everything is
FORMAT = 1  # version of the files in a folder
# Settings of every run, also of versions that wrote no mark.
_ALWAYS_SET = {"out", "method", "lr", "eps", "steps", "batch_size", "seed"}
_MODEL_KINDS = ("causal", "masked")
_MOST_TOKENS = 2**31


def marked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a mark (version and format) that identifies the folder of a run or a sweep."""
    return {"zo_kernels": zo.__version__, "format": FORMAT, **values}


def unmarked(path: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """The values without the mark.

    None if there is only the mark: a run is being replaced, or its replacement was killed. Raises ValueError if another
    program or a later version wrote them.
    """
    by, format = values.pop("zo_kernels", None), values.pop("format", None)
    if (by, format) == (None, None):  # a version that wrote no mark
        return values
    if not isinstance(by, str) or isinstance(format, bool) or not isinstance(format, int):
        raise ValueError(f"{path}: zo_kernels, format: expected a version and a number, got {by!r:.40}, {format!r:.40}")
    if format != FORMAT:
        raise ValueError(f"{path}: format: expected {FORMAT}, got {format!r:.20}, written by zo_kernels {by!r:.40}")
    return values or None


def is_run(folder: Path) -> bool:
    """Whether the folder certainly holds a run of zo-finetune.

    Its settings must be marked, or be known fields that include those of every run. Raises ValueError or OSError if the
    settings cannot be read.
    """
    path = folder / CONFIG
    if not os.path.lexists(path):
        return False
    values = unmarked(path, schema.read_json(path))
    return values is None or _ALWAYS_SET <= values.keys() <= get_type_hints(Config).keys()


def config_of(run: str | Path) -> Config:
    """The settings that a run was started with. `out` is where its folder is now.

    Raises ValueError if the folder has no settings, or they are damaged.
    """
    path = Path(run) / CONFIG
    try:
        values = unmarked(path, schema.read_json(path))
    except FileNotFoundError as error:
        if Path(run).is_dir():
            raise ValueError(
                f"{run}: expected the folder of a run, but it has no {CONFIG}: no run has begun in it"
            ) from None
        raise ValueError(f"{run}: expected the folder of a run, with its {CONFIG}: {error}") from error
    except OSError as error:
        raise ValueError(f"{run}: expected the folder of a run, with its {CONFIG}: {error}") from error
    if values is None:
        raise ValueError(
            f"{run}: expected the folder of a run, but its earlier run was being replaced and no new run has begun"
            " in it"
        )
    hints = get_type_hints(Config)
    settings = schema.check(str(path), values, hints, optional=hints.keys() - _ALWAYS_SET)
    try:
        return Config(**{**settings, "out": str(run)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_config(folder: Path, config: Config | None) -> None:
    """Write the settings of a run. None writes only the mark: the run in the folder is about to be replaced."""
    write_json(folder / CONFIG, marked({} if config is None else dataclasses.asdict(config)))


def started(folder: Path) -> bool:
    """Whether the folder has the settings of a run. Raises ValueError or OSError if they cannot be read."""
    path = folder / CONFIG
    return os.path.lexists(path) and unmarked(path, schema.read_json(path)) is not None


def begun(folder: Path) -> bool:
    """Whether the run has saved what it starts with."""
    return os.path.lexists(folder / START / LABELS)


def finished(folder: Path) -> bool:
    """Whether the run has saved its model."""
    return os.path.lexists(folder / MODEL / LABELS)


@dataclasses.dataclass(frozen=True)
class Description:
    """Facts about a model that its weights do not tell. The last three are only set for models with prompts."""

    names: tuple[str, ...]
    max_tokens: int
    max_new_tokens: int | None = None
    task: str | None = None
    kind: str | None = None


def write_description(folder: Path, about: Description) -> None:
    """Write LABELS into START or MODEL, with the sizes and checksums of the weights. To be called last."""
    values = {name: value for name, value in dataclasses.asdict(about).items() if value is not None}
    weights = {path.name: _checksum(path) for path in sorted(folder.glob("*.safetensors"))}
    write_json(folder / LABELS, {**values, "weights": weights})


def read_description(folder: Path) -> Description:
    """Read LABELS of START or MODEL, and check the weights.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged; the message says which.
    """
    path = folder / LABELS
    hints = {**get_type_hints(Description), "weights": dict}
    values = schema.check(str(path), schema.read_json(path), hints, hints.keys() - {"names", "max_tokens"})
    weights = values.pop("weights", {})  # earlier versions wrote none
    about = Description(**values)
    for name in ("max_tokens", "max_new_tokens"):
        value = getattr(about, name)
        if value is not None and not 0 < value < _MOST_TOKENS:
            raise ValueError(f"{path}: {name}: expected a whole number from 1 to below {_MOST_TOKENS}, got {value}")
    if not about.names:
        raise ValueError(f"{path}: names: expected at least one label, got none")
    if about.task is not None and (about.task not in TASKS or about.kind not in _MODEL_KINDS):
        raise ValueError(
            f"{path}: task, kind: expected one of {', '.join(TASKS)} and one of {', '.join(_MODEL_KINDS)}, got "
            f"{about.task!r:.40} and {about.kind!r:.40}"
        )
    if about.task is not None and about.max_new_tokens is None:
        raise ValueError(f"{path}: max_new_tokens: expected a whole number, but the field is missing")
    for name, expected in weights.items():
        if re.fullmatch(r"[\w.-]+\.safetensors", name) is None:
            raise ValueError(f"{path}: weights: expected names of .safetensors files, got {name!r:.80}")
        schema.check_file(folder / name)
        if (got := _checksum(folder / name)) != expected:
            again = f"; delete {folder}: --resume makes it again" if folder.name == START else ""
            raise ValueError(
                f"{folder / name}: the file is damaged: expected size and checksum {expected!r:.60}, got {got}{again}"
            )
    return about


def _checksum(path: Path) -> str:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return f"{size}-{crc:08x}"


def description(run: str | Path) -> Description:
    """The description of a finished run's model.

    Raises:
        FileNotFoundError: the folder has no finished run.
        ValueError: the model is damaged.
    """
    if not finished(Path(run)):
        raise FileNotFoundError(
            f"{run}: expected the folder of a finished run, but it has no {MODEL}/{LABELS}{_way_on(Path(run))}"
        )
    with model_of(run):
        return read_description(Path(run) / MODEL)


@contextmanager
def model_of(run: str | Path) -> Iterator[None]:
    """While reading a finished run's model: turn any error into a ValueError that says how to make the model again."""
    try:
        yield
    except Exception as error:
        how = (
            _way_on(Path(run))
            or "; if it came from a run, make it again in a new folder: zo-finetune replay RUN --out DIR"
        )
        raise ValueError(f"{Path(run) / MODEL}: the model is damaged: {error}{how}") from error


def _way_on(run: Path) -> str:
    """What to do about a run whose model is missing or damaged."""
    if not os.path.lexists(run / CONFIG) or not os.path.lexists(run / TRAJECTORY):
        return ""
    ended = os.path.lexists(run / CURVES)
    return (
        f"; make it from the trajectory: zo-finetune replay {run} --out DIR"
        if ended
        else f"; the run was cut off, continue it: zo-finetune --resume {run}"
    )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into. At the end it replaces `target`, once everything in it is on the disk."""
    part = target.with_name(target.name + files.PART)
    discard(part)
    part.mkdir(parents=True)
    try:
        yield part
        for path in (*part.rglob("*"), part):
            files.sync_folder(path) if path.is_dir() else files.sync(path)
        discard(target)  # it is not whole, since it has no LABELS
        os.replace(part, target)
    except BaseException:
        discard(part)  # gives a full disk its room back
        raise
    files.sync_folder(target.parent)


def discard(path: Path) -> None:
    """Delete a file, a folder or a link. What a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, all or nothing, whenever the process may die."""
    files.replace(path, (json.dumps(value, indent=2) + "\n").encode())
