"""Warnings that point to the user's line, however many frames lie between."""

from __future__ import annotations

import sys
import warnings

_BETWEEN = ("zo_kernels", "torch", "transformers", "accelerate")


def warn(message: str) -> None:
    """As `warnings.warn`, at the innermost line that is none of this package or of what calls it for a user."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Warner:
    """What would make a run wrong, if nobody looks at it: said once each; or raised, if `strict`."""

    def __init__(self, strict: bool):
        self.strict = strict
        self._said: set[str] = set()

    def warn(self, about: str, message: str) -> None:
        """Warn, unless that was said of the same thing before.

        Raises:
            ValueError: instead of the warning, every time, if strict.
        """
        if self.strict:
            raise ValueError(message)
        self.note(about, message)

    def note(self, about: str, message: str) -> None:
        """Warn once of what is as documented, but may not be what somebody expects: no error, however strict."""
        if about not in self._said:
            self._said.add(about)
            warn(message)

    def warned(self, about: str) -> bool:
        """Whether it was said, so that another time would say nothing."""
        return about in self._said
