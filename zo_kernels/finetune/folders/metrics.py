"""What a run measures: steps, evaluations, a summary. metrics.jsonl has one JSON object a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

from zo_kernels import files
from zo_kernels.finetune.folders import schema
from zo_kernels.finetune.folders.run_folder import METRICS


@dataclass(frozen=True)
class Step:
    """What one step did. `loss` is None if the step was refused: a loss was not finite, or the update too large.

    `seconds` is the time of `optimizer.step`: its forwards (`forward_seconds`) and the rest, which is our passes over
    the weights (`pass_seconds`). The time to put batches together (`batch_seconds`) is not part of it.
    """

    loss: float | None
    lr: float
    seconds: float
    forward_seconds: float
    pass_seconds: float
    batch_seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over a split; `f1` is the mean F1 of generated answers."""

    loss: float
    accuracy: float
    f1: float | None = None

    @property
    def score(self) -> float:
        """The number that counts: F1 for generated answers, else the accuracy."""
        return self.accuracy if self.f1 is None else self.f1

    @property
    def metric(self) -> str:
        """The name of the score."""
        return "accuracy" if self.f1 is None else "F1"

    def as_record(self) -> dict[str, Any]:
        """The values that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Summary:
    """The outcome of a run.

    `before` and `after` were measured on the held-out test. The shares of forwards and passes are of the time in steps.
    `peak_rss` is in bytes. `seconds` is the time of the whole run.
    """

    before: Evaluation
    after: Evaluation
    steps: int
    step_seconds: float
    forward_share: float
    pass_share: float
    refused_steps: int
    peak_rss: int
    seconds: float
    test_texts: int

    def as_record(self) -> dict[str, Any]:
        """The record in the metrics."""
        return {**asdict(self), "before": self.before.as_record(), "after": self.after.as_record()}


_MOST_OF_LINE = 1 << 20
_EVENTS: dict[str, dict[str, Any] | None] = {  # None: its fields are not checked
    "start": None,
    "evaluation": {
        "split": str, "step": int, "loss": float, "accuracy": float, "f1": float | None, "seconds": float
    },
    "lr": {
        "step": int, "lr": float, "learned": bool, "forwards": int, "baseline": tuple[float, ...],
        "tried": tuple[dict, ...],
    },
    "step": {"step": int, **get_type_hints(Step)},
    "resume": {"step": int},
    "trained": {"step": int, "stopped": str | None},
    "summary": None,
}  # fmt: skip
_OPTIONAL = ("f1",)


class Metrics:
    """The records of a run, in memory (`records`) and in metrics.jsonl. A context manager.

    Every record is written at once, by one call, so that others can watch the file and a run that is cut off leaves
    what it did. When a run is resumed, the file is not changed before `begin`; records until then are kept in memory.

    Args:
        folder: the run folder.
        resumed: read the records that are there.
        recover: leave out damaged lines instead of refusing the file.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: a line is damaged; the message names it.
    """

    def __init__(self, folder: Path, *, resumed: bool = False, recover: bool = False) -> None:
        self._path = folder / METRICS
        self._file: int | None = None
        self.records: list[dict[str, Any]] = []
        self._sound = True
        if not resumed:
            self.begin(0)
            return
        for number, line in _lines(self._path):
            try:
                self.records.append(_checked(f"{self._path}: line {number}", line))
            except ValueError as error:
                if not recover:
                    raise ValueError(f"{error}; --recover leaves this line out and keeps a copy of the file") from error
                self._sound = False

    @property
    def reached(self) -> int:
        """The last step that has a record."""
        return max((r["step"] for r in self.records if "step" in r), default=0)

    def begin(self, upto: int) -> str | None:
        """Write the file, and every later record at once. Records of steps after `upto` and a summary are left out.

        Returns the name of a copy of the old file if steps or damaged lines were left out, else None.
        """
        copy = None
        if self.reached > upto or not self._sound:
            copy = files.unused(self._path, "damaged")
            shutil.copyfile(self._path, copy)
            files.sync(copy)
        self.records = [r for r in self.records if r["event"] != "summary" and r.get("step", 0) <= upto]
        files.replace(self._path, "".join(map(_line, self.records)).encode())
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        return None if copy is None else str(copy)

    def write(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self.records.append(record)
        if self._file is not None:
            data = memoryview(_line(record).encode())
            while data:
                data = data[os.write(self._file, data) :]

    def find(self, event: str, **values: Any) -> dict[str, Any] | None:
        """The last record of an event that has these values, or None."""
        wanted = {"event": event, **values}.items()
        return next((r for r in reversed(self.records) if wanted <= r.items()), None) if self.records else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics, which need not be there. A last line that was cut off is none.

    Raises:
        OSError: they cannot be read.
        ValueError: a line is damaged; the message says which.
    """
    path = folder / METRICS
    return [_checked(f"{path}: line {number}", line) for number, line in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers. A last line without its end, left by a killed process, is skipped."""
    if not os.path.lexists(path):
        return
    schema.check_file(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MOST_OF_LINE):
            number += 1
            if line.endswith(b"\n"):
                yield number, line
            elif len(line) == _MOST_OF_LINE:
                raise ValueError(f"{path}: line {number}: expected at most {_MOST_OF_LINE} bytes, got more")


def _checked(where: str, line: bytes) -> dict[str, Any]:
    record = schema.parse(where, line)
    event = record.get("event")
    if not isinstance(event, str) or event not in _EVENTS:
        raise ValueError(f"{where}: event: expected one of {', '.join(_EVENTS)}, got {event!r:.80}")
    hints = _EVENTS[event]
    if hints is None:
        record.pop("step", None)
        return record
    record = schema.check(where, record, {"event": str, **hints}, _OPTIONAL)
    if record["step"] < 0:
        raise ValueError(f"{where}: step: expected a whole number of at least 0, got {record['step']}")
    return record


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
