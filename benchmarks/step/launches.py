"""What a step asks of a GPU: how often its passes launch kernels, and whether anything in it waits for the device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from ..bench.profiled import events, profiled
from ..bench.registry import Row
from ..bench.timing import Watch

STEP, PART = "benchmark: step", "benchmark: "
_WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
)
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchCooperativeKernel")
_TO_HOST = "Memcpy DtoH"
Event = Mapping[str, Any]


class Ranges(Watch):
    """A watch whose parts are ranges of the profiler's trace instead of times."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        with record_function(PART + name):
            yield


def counted(run: Callable[[], object], device: torch.device, steps: int) -> Row:
    """The columns of a run of so many steps, whose parts a `Ranges` marks; nulls on a CPU."""
    if device.type != "cuda":
        return dict.fromkeys(count([]))
    run()
    with profiled(device) as seen, record_function(STEP):
        run()
    found = count(events(seen))
    return {name: value if isinstance(value, str) else value / steps for name, value in found.items()}


def count(trace: Iterable[Event]) -> Row:
    """Of the events of a trace, those within the step.

    A forward's own waiting is told apart: it is the model's, or that of the loss. Passes may run within a forward.
    """
    trace = [e for e in trace if e.get("ph") == "X"]
    of_cpu = [e for e in trace if e.get("cat") != "gpu_user_annotation"]
    in_step, in_passes, in_forwards = (_within(of_cpu, name) for name in (STEP, PART + "passes", PART + "forwards"))
    calls = [e for e in trace if e.get("cat") in ("cuda_runtime", "cuda_driver") and in_step(e)]
    to_host = {e["args"].get("correlation") for e in trace if e["name"].startswith(_TO_HOST)}
    waits = [e for e in calls if e["name"].partition("_v")[0] in _WAITS]
    ours = [e for e in calls if in_passes(e) or not in_forwards(e)]
    outside = [e for e in waits if e in ours]
    copies = [e for e in ours if e.get("args", {}).get("correlation") in to_host]
    return {
        "pass_launches_per_step": sum(e["name"].startswith(_LAUNCHES) and in_passes(e) for e in calls),
        "synchronisations_per_step": len(outside),
        "synchronised_by": " ".join(sorted({e["name"] for e in outside})),
        "copies_to_host_per_step": len(copies),
        "forward_synchronisations_per_step": len(waits) - len(outside),
    }


def _within(events: Sequence[Event], name: str) -> Callable[[Event], bool]:
    """Whether an event begins inside of a range of that name, on whatever thread."""
    ranges = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e["name"] == name)
    starts = [start for start, _ in ranges]

    def inside(e: Event) -> bool:
        i = bisect_right(starts, float(e["ts"])) - 1
        return i >= 0 and float(e["ts"]) <= ranges[i][1]

    return inside
