"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

_USABLE = 0.9  # of what is free: allocators round up and fragment
_GIB = 2**30


def free_bytes(device: str) -> int | None:
    """Of a GPU, or what the system says processes can still have; None where it does not say."""
    if device != "cpu":
        import torch

        here = torch.device(device)
        free, _ = torch.cuda.mem_get_info(here)
        return free + torch.cuda.memory_reserved(here) - torch.cuda.memory_allocated(here)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def lacking(device: str, needed: int) -> str | None:
    """Why so many bytes cannot be had, or None."""
    free = free_bytes(device)
    if free is None or needed <= _USABLE * free:
        return None
    return f"needs about {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB of {device} memory are free"
