"""What a run measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
