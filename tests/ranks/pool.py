"""Four ranks over gloo, started once for a file of tests; a scenario is run on 1 to 4 of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import children

RANKS = 4


def _serve(rank: int, store: str, connection: Any) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    groups = {size: distributed.new_group(range(size)) for size in (1, 2, 3, 4)}
    while (task := connection.recv()) is not None:
        scenario, size, arguments = task
        try:
            connection.send((None, scenario(groups[size], **arguments)))
        except Exception:
            connection.send((traceback.format_exc(), None))
    distributed.destroy_process_group()


class Pool:
    """Ranks that wait for something to do.

    Args:
        store: path of a file that does not exist yet.
    """

    def __init__(self, store: str):
        context = children.context()
        self._connections, self._ranks = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._ranks.append(process)

    def run(self, size: int, scenario: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What scenario(process group, **arguments) returns on each of the first `size` ranks."""
        for connection in self._connections[:size]:
            connection.send((scenario, size, arguments))
        answers = [connection.recv() for connection in self._connections[:size]]
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._ranks:
            process.join(20)
            process.kill()
