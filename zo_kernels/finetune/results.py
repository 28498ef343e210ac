"""What a run measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and share of right answers over a split."""

    loss: float
    accuracy: float


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
