"""Memory: the peak of calls, exact to the byte, and what a device has left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.profiler import record_function

from .profiled import events, profiled

_MARK = "benchmark: measured"
_USABLE = 0.9  # of the free memory: allocators round up and fragment
_GIB = 2**30

_Make = Callable[[nn.Module], Callable[[], object]]


def peak_bytes(
    model: nn.Module, forwards: Callable[[nn.Module], object], makers: Sequence[_Make], device: torch.device
) -> list[int]:
    """The peak memory of the forwards alone, then of the call that each maker returns.

    Each gets a copy of the model. The copy counts, and so does whatever the maker leaves allocated (snapshots, mask
    bits, buffers). What PyTorch allocates is counted, not what the system gives the process.
    """

    def peak(make: _Make) -> int:
        def prepare() -> Callable[[], object]:
            own = copy.deepcopy(model)  # within the measurement, which sees its memory come and go
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


def free_bytes(device: str) -> int | None:
    """Free memory of a GPU, or what the system can still give to processes; None if the system does not say."""
    if device != "cpu":
        here = torch.device(device)
        free, _ = torch.cuda.mem_get_info(here)
        return free + torch.cuda.memory_reserved(here) - torch.cuda.memory_allocated(here)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def lacking(device: str, needed: int) -> str | None:
    """Why so many bytes cannot be had, or None."""
    free = free_bytes(device)
    if free is None or needed <= _USABLE * free:
        return None
    return f"needs about {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB of {device} memory are free"
