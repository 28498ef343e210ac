"""What a run leaves behind in its folder, from which it can be resumed, replayed and used.

config.json, start/ (all that the pretrained model does not hold: head, labels), trajectory.zo, metrics.jsonl; when it
has finished also curves.png and model/.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from zo_kernels.finetune.config import Config

CONFIG, METRICS, CURVES, MODEL = "config.json", "metrics.jsonl", "curves.png", "model"
START, TRAJECTORY = "start", "trajectory.zo"
LABELS = "labels.json"  # written last of START and of MODEL: whoever finds it finds all
_PART = ".part"  # ends the name of a file until it is whole


def create(config: Config) -> Path:
    """Make the folder `config.out` and write the settings into it.

    Raises ValueError if it is a file, or holds anything and `config.overwrite` is not set. To overwrite means to
    replace the files of a run; other files stay.
    """
    folder = empty(str(config.out), "--out", overwrite=config.overwrite, hint=" (or add --overwrite)")
    clear(folder)
    write_json(folder / CONFIG, dataclasses.asdict(config))
    return folder


def clear(folder: Path) -> None:
    """Delete what is left of another run and could be taken for one's own, but for its settings."""
    for old in (TRAJECTORY, METRICS, f"{START}/{LABELS}", f"{MODEL}/{LABELS}"):
        (folder / old).unlink(missing_ok=True)


def empty(path: str, option: str, *, overwrite: bool = False, hint: str = "") -> Path:
    """The folder, made if need be. Raises ValueError if it is a file, or neither empty nor to be overwritten.

    A file that a killed run had only begun to write is no file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option}: expected a folder, got the file {folder}")
    if folder.is_dir() and not overwrite and any(not file.name.endswith(_PART) for file in folder.iterdir()):
        raise ValueError(f"{option}: expected an empty or new folder, got {folder} with files in it{hint}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def config_of(run: str | Path) -> Config:
    """The settings that a run was started with, `out` being where its folder is now.

    Raises ValueError if the folder has none.
    """
    if Path(run).is_dir() and not (Path(run) / CONFIG).exists():
        raise ValueError(f"{run}: expected the folder of a run, got one without {CONFIG}: no run has begun in it")
    try:
        settings = json.loads((Path(run) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run}: expected the folder of a run, with its {CONFIG}: {error}") from error
    known = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(settings, dict) or not settings.keys() <= known:
        raise ValueError(f"{run}: expected the settings of a run of this version in {CONFIG}")
    return Config(**{**settings, "out": str(run)})


def write_whole(path: Path, text: str) -> None:
    """All or nothing, whenever the process dies."""
    part = path.with_name(path.name + _PART)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Metrics:
    """Records, one JSON object a line; kept in `records` for the curves. A context manager.

    Args:
        folder: of the run.
        upto: keep the file's whole records, but for those of later steps and a summary; None to begin a new file.
    """

    def __init__(self, folder: Path, upto: int | None = None) -> None:
        path = folder / METRICS
        self.records: list[dict[str, Any]] = []
        if upto is not None and path.exists():
            self.records = [r for r in records_of(folder) if r.get("event") != "summary" and r.get("step", 0) <= upto]
            write_whole(path, "".join(json.dumps(r) + "\n" for r in self.records))
        self._file = path.open("w" if upto is None else "a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # for those who watch the file, and so that a run that is cut off leaves what it did

    def find(self, event: str, **values: Any) -> dict[str, Any] | None:
        """The last record of an event with these values."""
        wanted = {"event": event, **values}.items()
        return next((r for r in reversed(self.records) if wanted <= r.items()), None) if self.records else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The whole records of a run's metrics, which need not be there."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [record for record in map(_parse, lines) if record]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # cut off
        return None
    return record if isinstance(record, dict) and "event" in record else None


def begun(folder: Path) -> bool:
    """Whether the run's start is recorded in it."""
    return (folder / START / LABELS).is_file()


def finished(folder: Path) -> bool:
    """Whether the run has saved its model."""
    return (folder / MODEL / LABELS).is_file()


def description(run: str | Path) -> dict[str, Any]:
    """What a finished run says of its model: label names, tokens, and the task if it was learned with prompts.

    Raises FileNotFoundError if the folder has no finished run.
    """
    if not finished(Path(run)):
        raise FileNotFoundError(f"{run}: expected the folder of a finished run, got none with {MODEL}/{LABELS}")
    return json.loads((Path(run) / MODEL / LABELS).read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """All or nothing, whenever the process dies."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
