"""One step of an optimizer at a time: a thread that comes while another is inside is told so at once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from sys import _getframe
from threading import get_ident
from typing import Any, TypeVar

Visit = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])
NOT_COPIED = "_inside"  # the attribute of an optimizer that has the last visit


def alone(what: str) -> Callable[[Method], Method]:
    """For a method of an optimizer, or of what has it as `_optimizer`: no other such can begin on it meanwhile.

    There is no lock that an exception might leave behind, whatever line it comes at. Each visit is a dictionary, and
    whoever makes its own the "next" one of a visit that is over is inside; `setdefault` lets one thread do so. A visit
    is over when it says so, or when its frame is not on its thread's stack any more, which is looked at only where
    somebody would be refused otherwise.

    Raises:
        RuntimeError: something is inside, in another thread or further up in this one. Nothing is changed.
    """

    def decorated(method: Method) -> Method:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            attributes = getattr(self, "_optimizer", self).__dict__
            mine: Visit = {"what": what, "thread": get_ident(), "frame": _getframe()}
            last = attributes.get(NOT_COPIED)
            if last is None:
                last = attributes.setdefault(NOT_COPIED, {"over": True})
            if "over" not in last or last.setdefault("next", mine) is not mine:
                _follow(last, mine)
            try:
                attributes[NOT_COPIED] = mine
                return method(self, *args, **kwargs)
            finally:
                mine["over"] = True
                mine["frame"] = None  # which holds the closure

        return guarded  # type: ignore[return-value]

    return decorated


def _follow(last: Visit, mine: Visit) -> None:
    """From a visit to the last one there is, which must be over, and come after it."""
    while last is not mine:
        if "over" not in last and _goes_on(last):
            who = "another thread is" if last["thread"] != mine["thread"] else "this thread is already (in a closure?)"
            raise RuntimeError(
                f"{mine['what']}: {who} in {last['what']} of this optimizer, which does one thing at a time; nothing "
                "was changed"
            )
        last = last.setdefault("next", mine)


def _goes_on(visit: Visit) -> bool:
    """Whether its frame is on the stack of its thread."""
    frame = sys._current_frames().get(visit["thread"])
    while frame is not None:
        if frame is visit["frame"]:
            return True
        frame = frame.f_back
    return False
