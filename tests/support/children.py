"""Processes that begin without the threads, and the locks, of the one that runs the tests."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# What children import, installed modules only: the server knows nothing of the folders of tests. pytest, too, since a
# child imports the module that its parent was started with.
_IMPORTED = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.bert.modeling_bert",
    "transformers.models.opt.modeling_opt",
    "zo_kernels.finetune.runs.train",
    "zo_kernels.integrations.transformers",
]


def context() -> ForkServerContext:
    """Starts processes from a server that has imported what any of them needs, since there is one server for all."""
    result = multiprocessing.get_context("forkserver")
    result.set_forkserver_preload(_IMPORTED)
    return result
