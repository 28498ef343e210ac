"""Warnings that point to the user's line, however many frames lie between."""

from __future__ import annotations

import sys
import warnings

_OURS = ("zo_kernels.optim", "torch")


def warn(message: str) -> None:
    """As `warnings.warn`, at the innermost line that is neither of these optimizers nor of PyTorch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Doubts:
    """What would make a run wrong, if nobody looks at it: said once each; or raised, if `strict`."""

    def __init__(self, strict: bool):
        self.strict = strict
        self._said: set[str] = set()

    def say(self, about: str, message: str) -> None:
        """Warn, unless that was said of the same thing before.

        Raises:
            ValueError: instead of the warning, every time, if strict.
        """
        if self.strict:
            raise ValueError(message)
        if about not in self._said:
            self._said.add(about)
            warn(message)

    def heard(self, about: str) -> bool:
        """Whether it was said, so that another time would say nothing."""
        return about in self._said
