"""What a run measures, as it goes: records in a file, one JSON object a line."""

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
    """What a step did. `loss` is None if the step was refused.

    `seconds` is the whole of `optimizer.step`: the forwards, and our passes over the weights, which are all of it that
    is not a forward. Putting batches together is counted by itself.
    """

    loss: float | None
    lr: float
    seconds: float
    forward_seconds: float
    pass_seconds: float
    batch_seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and share of right answers over a split; of generated answers also their mean F1."""

    loss: float
    accuracy: float
    f1: float | None = None

    @property
    def score(self) -> float:
        """What counts: F1 if there is one, else the accuracy."""
        return self.accuracy if self.f1 is None else self.f1

    @property
    def metric(self) -> str:
        """The name of the score."""
        return "accuracy" if self.f1 is None else "F1"

    def as_record(self) -> dict[str, Any]:
        """What there is of it, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Summary:
    """The outcome of a run. `before` and `after` are on the held-out test; shares are of the time in steps."""

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
        """For the metrics."""
        return {**asdict(self), "before": self.before.as_record(), "after": self.after.as_record()}


_MOST_OF_LINE = 1 << 20
_EVENTS: dict[str, dict[str, Any] | None] = {  # None: nothing in it is relied on, but as a whole
    "start": None,
    "evaluation": {
        "split": str, "step": int, "loss": float, "accuracy": float, "f1": float | None, "seconds": float
    },
    "step": {"step": int, **get_type_hints(Step)},
    "resume": {"step": int},
    "trained": {"step": int, "stopped": str | None},
    "summary": None,
}  # fmt: skip
_OPTIONAL = ("f1",)


class Metrics:
    """Records, kept in `records` for the curves. A context manager.

    A record is written at once, by one call, for those who watch the file, and so that a run that is cut off leaves
    what it did. Those of a run that is gone on with are kept back until `begin`.

    Args:
        folder: of the run.
        resumed: whether records are there already; nothing is changed before `begin`.
        recover: leave out lines that are damaged, instead of refusing them.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: a line of it is damaged; the message says which.
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
                    raise ValueError(f"{error}; --recover leaves it out and keeps a copy of the file") from error
                self._sound = False

    @property
    def reached(self) -> int:
        """The last step that a record speaks of."""
        return max((r["step"] for r in self.records if "step" in r), default=0)

    def begin(self, upto: int) -> str | None:
        """Write from now on, and what was kept back. Records of later steps than `upto`, and a summary, are left out.

        Returns a copy's name if more than that is left out: steps, or what was damaged.
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
        """The last record of an event with these values."""
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
    """With their numbers, but for the last one if a killed process left it without its end."""
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
