"""`signals_held`: SIGINT waits for the end of a block, and whoever handled it handles it again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from zo_kernels import interrupts
from zo_kernels.interrupts import signals_held


@pytest.fixture(params=["the interpreter's own functions", "those of the library"], autouse=True)
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`signal`'s own, where an interpreter has nothing below it."""
    if request.param == "those of the library":
        monkeypatch.setattr(interrupts, "_plain", signal)
    else:
        assert interrupts._plain is not signal


@pytest.fixture(autouse=True)
def set_handler() -> Iterator[Callable[[Any], None]]:
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_it_waits_for_the_end_of_the_outermost_block(set_handler: Callable[[Any], None]) -> None:
    set_handler(signal.default_int_handler)
    done = []
    with pytest.raises(KeyboardInterrupt), signals_held():
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_are_handled_once_by_the_handler_that_was_there(set_handler: Callable[[Any], None]) -> None:
    seen: list[tuple[int, bool]] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append((number, frame is not None))

    set_handler(handler)
    with signals_held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert not seen
    assert seen == [(signal.SIGINT, True)]
    assert signal.getsignal(signal.SIGINT) is handler
    signal.raise_signal(signal.SIGINT)
    assert len(seen) == 2


def test_a_block_that_fails_puts_the_handler_back(set_handler: Callable[[Any], None]) -> None:
    set_handler(signal.default_int_handler)
    with pytest.raises(ValueError, match=r"^its own$"), signals_held():
        raise ValueError("its own")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_not_handled_in_python_is_left_alone(set_handler: Callable[[Any], None], ignored: Any) -> None:
    set_handler(ignored)
    with signals_held():
        assert signal.getsignal(signal.SIGINT) is ignored
        if ignored is signal.SIG_IGN:
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is ignored


def test_other_threads_hold_nothing(set_handler: Callable[[Any], None]) -> None:
    set_handler(signal.default_int_handler)
    seen: list[Any] = []

    def work() -> None:
        with signals_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
