"""Warnings that point to the user's line, and a `Warner` that gives each of them once."""

from __future__ import annotations

import sys
import warnings

_BETWEEN = ("zo_kernels", "torch", "transformers", "accelerate")


def warn(message: str) -> None:
    """Warn at the user's line: the innermost one outside this package, PyTorch, transformers and accelerate."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Warner:
    """Warns of mistakes that would make a run wrong in silence: once of each, or raises if `strict`."""

    def __init__(self, strict: bool):
        self.strict = strict
        self._said: set[str] = set()

    def warn(self, about: str, message: str) -> None:
        """Warn of a mistake, unless there was a warning about the same thing before.

        Raises:
            ValueError: instead of every warning, if strict.
        """
        if self.strict:
            raise ValueError(message)
        self.note(about, message)

    def note(self, about: str, message: str) -> None:
        """Warn once of behaviour that is documented but may surprise. This never raises, even if strict."""
        if about not in self._said:
            self._said.add(about)
            warn(message)

    def warned(self, about: str) -> bool:
        """Whether there was a warning about this, so that another one would be dropped."""
        return about in self._said
