"""A rank dies, or comes no more. Real processes, a group for each death, since none is of use afterwards."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import children

STEPS = 6
WHEN = ("in the constructor", "in the first closure", "in a closure", "in an exchange", "after a step", "in resume")
HOW: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(0),
    "loop": lambda: time.sleep(3600),
}
TIMEOUT = 2.0  # for those that come no more


@dataclass(frozen=True)
class Death:
    """Of which rank of how many, when, how, in which kind of run, and where the ranks have met."""

    rank: int = 1
    size: int = 3
    when: str = "in a closure"
    how: str = "killed"
    method: str = "MeZO"
    split: str = "batch"
    perturb: str = "in_place"
    met: str = "file"

    def __str__(self) -> str:
        return ", ".join(map(str, vars(self).values()))


def _rank(death: Death, rank: int, meet: str, folder: str, connection: Any) -> None:
    import scenarios
    import torch
    from models import block_mlp
    from torch import distributed

    import zo_kernels as zo

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:  # of faults that are meant to be
        os.dup2(nowhere.fileno(), 2)
    distributed.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=death.size, timeout=timedelta(seconds=60)
    )
    dies = rank == death.rank
    end = HOW[death.how]
    model, start = block_mlp(**scenarios.SHAPE), block_mlp(**scenarios.SHAPE)
    connection.send("ready")
    if dies and death.when == "in the constructor":
        end()
    parallel = zo.Parallel(death.split, None, check_every=2, timeout=TIMEOUT if death.how == "loop" else 20.0)
    options = {"directions": 2 * death.size} if death.split == "directions" else {}
    opt = scenarios.build(death.method, model, parallel=parallel, perturb=death.perturb, **options)
    if dies and death.when == "in an exchange":
        _end_within(distributed.ProcessGroup, end, after=9 if death.method == "MeZOSVRG" else 5)
    begin, ended, calls = time.monotonic(), "", itertools.count()
    at = {"in the first closure": (0, 0), "in a closure": (3, 2)}.get(death.when)
    try:
        if death.when == "in resume":
            if dies:
                end()
            opt.resume(Path(folder) / "run.zo", missing_ok=True)
        elif rank == 0:
            opt.record_to(Path(folder) / "run.zo")
        for step in range(STEPS):
            calls = itertools.count()

            def closure(loss: Any, calls: Any = calls, step: int = step) -> Any:
                if dies and at is not None and step == at[0] and next(calls) == at[1] % (2 if step else 1):
                    end()
                return loss()

            make = scenarios.CLOSURES[death.split]
            losses = [make(model, None, step), make(model, None, 1000)][: 1 + (death.method == "MeZOSVRG")]
            opt.step(*[lambda loss=loss: closure(loss) for loss in losses])
            if dies and death.when == "after a step" and step == 3:
                end()
            begin = time.monotonic()
    except RuntimeError as error:
        ended = f"{type(error).__name__}: {error}"
    took = time.monotonic() - begin
    again = ""
    try:
        opt.step(*[lambda: 1.0] * (1 + (death.method == "MeZOSVRG")))
    except RuntimeError as error:
        again = f"{type(error).__name__}: {error}"
    zo.replay(start, opt.trajectory)
    whole = all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    file = Path(folder) / "run.zo"
    begun = opt.trajectory.setups and death.when != "in resume"
    recorded = rank or not begun or zo.Trajectory.load(file).to_bytes() == opt.trajectory.to_bytes()
    connection.send({"ended": ended, "again": again, "took": took, "whole": whole, "recorded": bool(recorded)})
    distributed.destroy_process_group()


def _end_within(group_type: Any, end: Callable[[], Any], after: int) -> None:
    """Right after this rank has sent a part of its message."""
    gather, count = group_type.allgather, itertools.count(1)

    def allgather(*args: Any, **kwargs: Any) -> Any:
        work = gather(*args, **kwargs)
        if next(count) == after:
            end()
        return work

    group_type.allgather = allgather


def die(death: Death, limit: float = 20.0) -> list[str]:
    """What is wrong about how the others end; nothing, if all is well."""
    context, folder = children.context(), tempfile.mkdtemp()
    meet = f"file://{folder}/store"
    if death.met == "tcp":  # the first rank's process keeps the store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    processes, connections = [], []
    for rank in range(death.size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(death, rank, meet, folder, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    wrong = []
    try:
        for rank, connection in enumerate(connections):
            if not connection.poll(120) or connection.recv() != "ready":
                return [f"rank {rank} did not begin"]
        deadline = time.monotonic() + limit + (2 * TIMEOUT if death.how == "loop" else 0)
        for rank, connection in enumerate(connections):
            if rank == death.rank:
                continue
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                wrong.append(f"rank {rank} hangs")
                continue
            try:
                end = connection.recv()
            except EOFError:
                wrong.append(f"rank {rank} ended without a word, with {processes[rank].exitcode}")
                continue
            wrong += _faults(death, rank, end)
            processes[rank].join(max(0.5, deadline - time.monotonic()))
            if processes[rank].exitcode != 0:
                wrong.append(f"rank {rank} did not end well: {processes[rank].exitcode}")
    finally:
        for process in processes:
            process.kill()
            process.join(10)
        shutil.rmtree(folder, ignore_errors=True)
    return wrong


def _faults(death: Death, rank: int, end: dict[str, Any]) -> list[str]:
    said, wrong = end["ended"], []
    if not said.startswith("RankLost: ranks: lost "):
        wrong.append("another error")
    # Whom to look at is told in the first exchange, and with the first rank its store may die.
    early = death.met == "tcp" and death.rank == 0 and death.when in ("in the constructor", "in resume")
    unknown = early and "lost one or more of ranks 0" in said
    if not unknown and f"lost rank {death.rank} " not in said:
        wrong.append("another rank is named")
    if not end["whole"]:
        wrong.append("the weights are not those of the trajectory")
    if not end["recorded"]:
        wrong.append("the file is not the trajectory")
    if "RankLost" not in end["again"]:
        wrong.append(f"another step said {end['again']!r}")
    if end["took"] > (12.0 if death.how != "loop" else 2 * TIMEOUT + 4):
        wrong.append(f"it took {end['took']:.1f} s")
    return [f"{death}: rank {rank}: {what}: {said!r}" for what in wrong]


def every_death() -> list[Death]:
    """The long matrix."""
    runs = [
        ("MeZO", "batch", "in_place"),
        ("MeZO", "batch", "in_forward"),
        ("MeZO", "directions", "in_forward"),
        ("MeZOSVRG", "batch", "in_place"),
        ("MeZOSVRG", "directions", "in_forward"),
    ]
    return [
        Death(rank, size, when, how, *run, met)
        for size in (2, 3)
        for rank in dict.fromkeys((0, size - 1))
        for when in WHEN
        for how in HOW
        for run in runs
        for met in ("file", "tcp")
    ]


def main(every: int) -> int:
    """Each `every`-th death of the matrix; how many went wrong."""
    deaths, wrong = every_death()[::every], 0
    for i, death in enumerate(deaths):
        faults = die(death)
        wrong += bool(faults)
        print(f"{i + 1}/{len(deaths)} {death}: {'; '.join(faults) or 'as it should'}", flush=True)
    print(f"{len(deaths)} deaths, {wrong} went wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)))
