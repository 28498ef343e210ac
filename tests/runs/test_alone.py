"""One optimizer in two threads, or in its own closure: the second is refused at once, and nothing is left behind."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import block_mlp, real_loss
from scripted import METHODS, assert_same, snapshot, take_step

import zo_kernels as zo
from zo_kernels.runs import attempt
from zo_kernels.runs.graphed import GraphedStep
from zo_kernels.runs.run import VISIT

ENTRANCES: dict[str, Callable[[zo.ZeroOrderOptimizer, dict[str, Any]], Any]] = {
    "step": lambda opt, state: take_step(opt, lambda: 1.0),
    "load_state_dict": lambda opt, state: opt.load_state_dict(state),
    "resume": lambda opt, state: opt.resume("none.zo", missing_ok=True),
    "graphed": lambda opt, state: opt.graphed(lambda: 1.0),
    "graphed, called": lambda opt, state: GraphedStep(opt, lambda: 1.0, 1, False)(),
    "streaming": lambda opt, state: opt.streaming().__enter__(),
}


@pytest.mark.parametrize("elsewhere", [True, False], ids=["another thread", "the closure"])
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_what_comes_during_a_step_is_refused(method: str, entrance: str, elsewhere: bool) -> None:
    """The step that it came into is what it would have been."""
    ends = []
    for disturbed in (True, False):
        model = block_mlp(depth=2, width=4)
        opt = METHODS[method](model, lr=1e-2)
        state = opt.state_dict()
        told: list[str] = []

        def come(opt: Any = opt, state: Any = state, told: list[str] = told) -> None:
            with pytest.raises(RuntimeError) as error:
                ENTRANCES[entrance](opt, state)
            told.append(str(error.value))

        def closure(model: Any = model, come: Any = come, disturbed: bool = disturbed) -> Any:
            if disturbed and elsewhere:
                thread = threading.Thread(target=come)
                thread.start()
                thread.join()
            elif disturbed:
                come()
            return real_loss(model, 0)

        for _ in range(2):
            take_step(opt, closure)
        who = "another thread is" if elsewhere else r"this thread is already (in a closure?)"
        for text in told:
            assert text.startswith(f"{entrance.partition(',')[0]}: {who} in step of this optimizer")
        assert bool(told) == disturbed
        ends.append((snapshot(model), opt.trajectory))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


class Anything:
    """What is run alone, as an optimizer's methods are."""

    def __init__(self) -> None:
        self._run = SimpleNamespace()

    @attempt.alone("visit")
    def visit(self, call: Callable[[], Any]) -> Any:
        return call()


@contextmanager
def traced(come: Callable[[], None]) -> Iterator[None]:
    """Call `come` before each instruction of the guard."""

    def at_an_instruction(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != attempt.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            come()
        return at_an_instruction

    before = sys.gettrace()
    sys.settrace(at_an_instruction)
    try:
        yield
    finally:
        sys.settrace(before)


def test_an_exception_at_any_instruction_leaves_no_lock() -> None:
    """Wherever it comes, while its traceback is kept: the next visit is let in."""
    kept, at = [], 0
    while True:
        it, left = Anything(), [at]
        it.visit(int)

        def come(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

        with traced(come):
            try:
                it.visit(int)
            except KeyboardInterrupt as error:
                kept.append(error)
        assert it.visit(lambda: 5) == 5, f"locked by an exception at opcode {at}"
        if left[0] >= 0:
            break
        at += 1
    assert len(kept) > 50


def test_of_two_threads_one_is_inside_wherever_they_meet() -> None:
    """At every instruction of one's entry the other comes, and stays if it is let in."""
    met, at = set(), 0
    while True:
        it, left = Anything(), [at]
        it.visit(int)
        inside, here, tried, leave = [], [], threading.Event(), threading.Event()

        def stay(inside: Any = inside, tried: Any = tried, leave: Any = leave) -> None:
            inside.append("other")
            tried.set()
            leave.wait()
            inside.remove("other")

        def other(it: Any = it, stay: Any = stay, tried: Any = tried) -> None:
            with suppress(RuntimeError):
                it.visit(stay)
            tried.set()

        thread = threading.Thread(target=other)

        def come(thread: Any = thread, tried: Any = tried, left: Any = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                thread.start()
                tried.wait()

        def body(inside: Any = inside, here: Any = here) -> None:
            here.append([*inside, "this"])

        refused = False
        with traced(come):
            try:
                it.visit(body)
            except RuntimeError:
                refused = True
        leave.set()
        if left[0] >= 0:
            break
        thread.join()
        assert here == ([] if refused else [["this"]]), f"both are inside if they meet at opcode {at}"
        met.add(refused)
        it.visit(int)
        at += 1
    assert met == {True, False} and at > 50


def test_a_thread_that_died_inside_locks_nobody_out() -> None:
    it = Anything()
    it.visit(int)
    visit = it._run.__dict__[VISIT]
    dead = threading.Thread(target=lambda: visit.update(thread=threading.get_ident(), frame=sys._getframe()))
    dead.start()
    dead.join()
    del visit["over"]
    assert it.visit(lambda: 5) == 5


def test_no_closure_is_kept_and_copies_go_their_own_way() -> None:
    model = block_mlp(depth=2, width=4)
    opt = zo.MeZO(model, lr=1e-2)
    copies: list[Any] = []

    def closure() -> Any:
        if not copies:
            copies.extend([copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))])
        return real_loss(model, 0)

    opt.step(closure)
    visit = opt._run.__dict__[VISIT]
    assert visit["frame"] is None and visit["over"]
    for other in copies:
        assert VISIT not in other._run.__dict__
        other.step(lambda: 1.0)
    assert all(torch.isfinite(p).all() for p in model.parameters())
