"""Processes that begin without the threads, and the locks, of the one that runs the tests."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def context(*imported: str) -> ForkServerContext:
    """Starts processes from a server that has imported some installed modules, so that they are imported once for all.

    The server knows nothing of the folders of tests.
    """
    result = multiprocessing.get_context("forkserver")
    result.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", *imported])
    return result
