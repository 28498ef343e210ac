"""PyTorch's profiler, quiet, and the events of its trace."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(device: torch.device, *, memory: bool = False) -> Iterator[profile]:
    """Profile the block, on a GPU until its last kernel has ended."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints when it starts and ends
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, profile_memory=memory) as seen:
        yield seen
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def events(seen: profile) -> list[dict[str, Any]]:
    """The events of the Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]
