"""Peak memory of calls, exact to the byte: what PyTorch allocates, not what the system happens to give the process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.profiler import record_function

from .profiled import events, profiled

_MARK = "benchmark: measured"


def peak_bytes(
    model: nn.Module,
    forwards: Callable[[nn.Module], object],
    makers: Sequence[Callable[[nn.Module], Callable[[], object]]],
    device: torch.device,
) -> list[int]:
    """The peak memory of the forwards alone, then that of the call that each of the makers makes.

    The model counts, and what a maker leaves allocated (snapshots, mask bits, buffers). Each gets a copy of the model.
    """

    def peak(make: Callable[[nn.Module], Callable[[], object]]) -> int:
        def prepare() -> Callable[[], object]:
            own = copy.deepcopy(model)  # made here, so that its memory is seen to come and to go
            forwards(own)
            return make(own)

        return _peak_cuda(prepare, device) if device.type == "cuda" else _peak_cpu(prepare)

    return [peak(make) for make in (lambda own: lambda: forwards(own), *makers)]


def _peak_cuda(prepare: Callable[[], Callable[[], object]], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    call = prepare()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu(prepare: Callable[[], Callable[[], object]]) -> int:
    with profiled(torch.device("cpu"), memory=True) as seen:
        call = prepare()
        with record_function(_MARK):
            call()
    trace = events(seen)
    start = next(e["ts"] for e in trace if e["name"] == _MARK)
    allocated = peak = 0
    for event in sorted((e for e in trace if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        if event["ts"] >= start:
            peak = max(peak, allocated)
        allocated += event["args"]["Bytes"]
    return max(peak, allocated)
