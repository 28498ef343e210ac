"""Real signals whose handlers raise, and exceptions that another thread sets, at random moments of steps."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from attack.victims import Kind, Victim
from attack.workers import Result, expect

WIDTH = 160
SIGNALS = {"SIGALRM": signal.SIGALRM, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGINT": signal.SIGINT}
WAYS = [*SIGNALS, "thread"]
RATE = {"lr": 1e-5}  # of many weights
KINDS = {
    "in place": Kind(),
    "in place, directions": Kind(options={"directions": 2}),
    "in place, bf16": Kind(options={"perturb": "in_place"}, dtype=torch.bfloat16),
    "in place, sparse": Kind("SparseMeZO"),
    "in forward": Kind(options={"perturb": "in_forward"}),
    "in forward, bf16": Kind(options={"perturb": "in_forward"}, dtype=torch.bfloat16),
    "streamed": Kind(options={"execution_device": "cpu"}),
    "svrg in place": Kind("MeZOSVRG"),
    "svrg in forward": Kind("MeZOSVRG", {"perturb": "in_forward"}),
}
STEPS = 20  # disturbed ones a case
Case = tuple[str, str, int]


class Limit(BaseException):
    """What a handler raises."""


class Later(Exception):
    """The same, as time limits raise it, which an `except Exception` catches."""


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` is of exceptions; each case has several."""
    draw = random.Random(seed)
    every = [(kind, way) for kind in KINDS for way in WAYS]
    for i in range(-(-count // STEPS)):
        kind, way = every[i * 7 % len(every)]
        yield kind, way, draw.getrandbits(32)


class Sender:
    """A thread that disturbs the main one after a while, unless it is called off."""

    def __init__(self, way: str, error: type[BaseException]):
        self.way, self.error = way, error
        self._main = threading.main_thread().ident
        self.entered = False

    def arm(self, seconds: float) -> None:
        self.entered, self._off = False, threading.Event()
        self._thread = threading.Thread(target=self._send, args=(seconds, self._off))
        self._thread.start()

    def _send(self, seconds: float, off: threading.Event) -> None:
        while not self.entered:  # not while the thread is being started
            if off.wait(1e-5):
                return
        at = time.perf_counter() + seconds
        while time.perf_counter() < at:
            if off.wait(min(2e-4, max(0.0, at - time.perf_counter()))):
                return
        if self.way == "thread":
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main or 0), ctypes.py_object(self.error))
        else:
            os.kill(os.getpid(), SIGNALS[self.way])

    def disarm(self) -> None:
        self._off.set()
        self._thread.join()
        if self.way == "thread":  # what was not delivered yet
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main or 0), None)


def attempt(case: Case) -> Result:
    name, way, seed = case
    draw = random.Random(seed)
    error = draw.choice((Limit, Later))
    torch.manual_seed(0)
    kind = KINDS[name]
    rates = {**RATE, "anchor_lr": 1e-5} if kind.method == "MeZOSVRG" else RATE
    kind = replace(kind, options={**kind.options, **rates})
    model, twin = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).to(kind.dtype) for _ in range(2))
    x = torch.randn(2, WIDTH).to(kind.dtype)
    path = Path("run.zo")
    path.unlink(missing_ok=True)
    armed = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise error

    before = {s: signal.signal(s, handler) for s in SIGNALS.values()} if way != "thread" else {}
    sender = Sender(way, error)
    raised = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            victim = Victim(kind, path, model, lambda data: model(x).float().square().mean() * (1 + data % 7))
            victim._mirror = twin
            times = [time.perf_counter()]
            for _ in range(5):
                victim.step()
                times.append(time.perf_counter())
            length = min(b - a for a, b in pairwise(times))
            for i in range(STEPS):
                came = False
                try:
                    try:
                        armed = True
                        if way == "SIGALRM":
                            signal.setitimer(signal.ITIMER_REAL, max(1e-5, draw.random() * length))
                        else:
                            sender.arm(draw.random() * length)
                        sender.entered = True
                        victim.step()
                    finally:
                        _quiet(sender, way)
                        armed = False
                except (Limit, Later):
                    came = True
                _quiet(sender, way)
                armed = False
                raised += came
                wrong = victim.check(f"{name}, {way}, {error.__name__}, disturbed step {i}")
                expect(not wrong, wrong)
            victim.check_after(f"{name}, {way}, {error.__name__}")
    finally:
        for s, old in before.items():
            signal.signal(s, old)
    return Result("sound", tally={"raised": raised, "disturbed": STEPS})


def _quiet(sender: Sender, way: str) -> None:
    """Nothing comes any more. What comes meanwhile is caught."""
    for _ in range(3):
        try:
            if way == "SIGALRM":
                signal.setitimer(signal.ITIMER_REAL, 0)
            elif hasattr(sender, "_thread"):
                sender.disarm()
            return
        except (Limit, Later):
            continue
