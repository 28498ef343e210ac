"""Times of calls in alternating pairs, so that whatever else the machine does falls on both sides alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_MOST_ROUNDS = 2000
_MOST_IN_A_BATCH = 20
_BATCH_SECONDS = 1e-3


class Watch:
    """Times the named parts of a call. A part within another one does not count towards the outer one.

    On a GPU it records events, so that watching does not wait for the device.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, str | None, Any, Any]] = []
        self._inside: list[str] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        around = self._inside[-1] if self._inside else None
        self._inside.append(name)
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, around, start, self._mark()))
            self._inside.pop()

    def clear(self) -> None:
        self._spans.clear()

    def take(self) -> dict[str, float]:
        """Seconds of each part since the watch was cleared; the device must be done."""
        sums: dict[str, float] = {}
        for name, around, start, end in self._spans:
            seconds = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            sums[name] = sums.get(name, 0.0) + seconds
            if around is not None:
                sums[around] = sums.get(around, 0.0) - seconds
        self.clear()
        return sums


@dataclass(frozen=True)
class Call:
    """Something to time.

    Args:
        run: the call; it does the same amount of work each time.
        threads: how many threads PyTorch (and the native backend with it) may use.
        watch: where the call notes its parts.
        steps: how many steps one call makes; times are given for one step.
    """

    run: Callable[[], object]
    threads: int = 1
    watch: Watch | None = None
    steps: int = 1


@dataclass(frozen=True)
class Sample:
    """Times of one call, in seconds.

    Args:
        seconds: wall clock.
        cpu_seconds: processor time of all threads; None on a GPU. Other load changes it less than `seconds`; with one
            thread it is nearly what `seconds` would be on a quiet machine.
        parts: the parts that the call's watch saw, and "other" for the rest.
        launch_seconds: host time to hand the call to a GPU; None on a CPU.
    """

    seconds: float
    cpu_seconds: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    launch_seconds: float | None = None

    def of(self, part: str | None) -> float:
        return self.seconds if part is None else self.parts[part]


@dataclass(frozen=True)
class Plan:
    """How long to measure: at least `rounds` pairs, and on until `seconds` have passed.

    With `second`, each sample is the second of two calls in a row. In a training run a step finds the memory that the
    step before it used; calls that take seconds and take turns would find theirs cold.
    """

    rounds: int
    seconds: float
    second: bool = False


class Timer:
    """Times one call: by the wall clock on a CPU; on a GPU by events around it, after emptying the L2 cache.

    A sample of a short call on a GPU is the mean of a batch whose calls are queued together: the device, not the host,
    sets the pace as long as emptying the cache takes longer than launching.
    """

    def __init__(self, device: torch.device):
        self._flush: torch.Tensor | None = None
        self._batches: dict[Call, int] = {}
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def sample(self, call: Call) -> Sample:
        if torch.get_num_threads() != call.threads:
            torch.set_num_threads(call.threads)
        if call.watch is not None:
            call.watch.clear()
        cpu = launch = None
        batch = 1
        if self._flush is not None:
            batch = self._batch(call, self._flush)
            seconds, launch = _cuda(call.run, self._flush, batch)
        else:
            start, cpu_start = time.perf_counter(), time.process_time()
            call.run()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        parts = {}
        if call.watch is not None:
            parts = call.watch.take()
            parts["other"] = seconds - sum(parts.values())
        steps = batch * call.steps
        cpu, launch = (None if total is None else total / steps for total in (cpu, launch))
        return Sample(seconds / steps, cpu, {name: s / steps for name, s in parts.items()}, launch)

    def _batch(self, call: Call, flush: torch.Tensor) -> int:
        """How many calls make up a sample: decided by the second call, since the first compiles and allocates."""
        if call not in self._batches:
            _cuda(call.run, flush, 1)
            seconds, _ = _cuda(call.run, flush, 1)
            self._batches[call] = max(1, min(_MOST_IN_A_BATCH, int(_BATCH_SECONDS / seconds)))
            if call.watch is not None:
                call.watch.clear()
        return self._batches[call]


def _cuda(run: Callable[[], object], flush: torch.Tensor, times: int) -> tuple[float, float]:
    """Seconds that so many calls take the device, and the host."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    host = 0.0
    for start, end in events:
        flush.zero_()
        start.record()
        before = time.perf_counter()
        run()
        host += time.perf_counter() - before
        end.record()
    events[-1][1].synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / 1e3, host


def alternate(
    ours: Call, others: Mapping[str, Call], timer: Timer, plan: Plan
) -> dict[str, list[tuple[Sample, Sample]]]:
    """Pairs (ours, other) for each of the others, one timed right after the other; they take turns in going first."""
    pairs: dict[str, list[tuple[Sample, Sample]]] = {name: [] for name in others}

    def sample(call: Call) -> Sample:
        if plan.second:
            timer.sample(call)
        return timer.sample(call)

    threads = torch.get_num_threads()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for call in (ours, *others.values()):  # warm-up
            timer.sample(call)
        start, rounds = time.perf_counter(), 0
        while rounds < plan.rounds or (time.perf_counter() - start < plan.seconds and rounds < _MOST_ROUNDS):
            for name, other in others.items():
                if rounds % 2 == 0:
                    a, b = sample(ours), sample(other)
                else:
                    b, a = sample(other), sample(ours)
                pairs[name].append((a, b))
            rounds += 1
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
    return pairs


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)
