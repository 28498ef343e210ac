"""What a step asks of a GPU: how often its passes launch kernels, and whether anything in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from ..bench.profiled import events, profiled
from ..bench.registry import Row
from ..bench.timing import Watch

STEP, PART = "benchmark: step", "benchmark: "
_WAITS = {
    *(f"cuda{what}" for what in ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy")),
    *(f"cu{what}" for what in ("StreamSynchronize", "CtxSynchronize", "EventSynchronize")),
}
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
    return {name: v if isinstance(v, str) else v / steps for name, v in count(events(seen)).items()}


def count(trace: Iterable[Event]) -> Row:
    """Count launches and waits among the events of a trace that lie within the step.

    Waits within a forward are counted apart: they are the model's, or the loss's. Passes may run within a forward.
    """
    trace = [e for e in trace if e.get("ph") == "X"]
    of_cpu = [e for e in trace if e.get("cat") != "gpu_user_annotation"]
    in_step, in_passes, in_forwards = (_within(of_cpu, name) for name in (STEP, PART + "passes", PART + "forwards"))
    calls = [e for e in trace if e.get("cat") in ("cuda_runtime", "cuda_driver") and in_step(e)]
    to_host = {e["args"].get("correlation") for e in trace if e["name"].startswith(_TO_HOST)}
    waits = [e for e in calls if e["name"].partition("_v")[0] in _WAITS]
    ours = [e for e in calls if in_passes(e) or not in_forwards(e)]
    outside = [e for e in waits if e in ours]
    return {
        "pass_launches_per_step": sum(e["name"].startswith(_LAUNCHES) and in_passes(e) for e in calls),
        "synchronisations_per_step": len(outside),
        "synchronised_by": " ".join(sorted({e["name"] for e in outside})),
        "copies_to_host_per_step": sum(e.get("args", {}).get("correlation") in to_host for e in ours),
        "forward_synchronisations_per_step": len(waits) - len(outside),
    }


def _within(events: Sequence[Event], name: str) -> Callable[[Event], bool]:
    """Whether an event begins inside a range of that name, on whatever thread."""
    ranges = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e["name"] == name]
    return lambda e: any(start <= float(e["ts"]) <= end for start, end in ranges)
