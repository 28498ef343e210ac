"""The four experiments on one peer, ours beside it: time, memory, exactness, loss."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bench.compare import Trial, Versus, compare
from ..bench.memory import peak_bytes
from ..bench.registry import Row, Target, Unavailable, Wrong, judge
from ..bench.timing import Call, Plan, Watch
from ..step.shapes import SHAPES, Batch, Task
from .adapters import PEERS, Peer, ours
from .check import Loss, Settings, Step, noise_repeats

CPU = torch.device("cpu")
_MIB = 2**20
_FASTER = 3.0  # than every other package, where passes dominate: on this shape and batch
_STATED_FOR = ("opt-125m", Batch(1, 32))
_SMALL_CHANGE = 0.1  # MiB


@dataclass(frozen=True)
class Spec:
    """One experiment on one peer.

    Args:
        experiment: a name of `EXPERIMENTS`.
        peer: a name of `PEERS`.
        checkout: the path to its code, None if it is installed.
        steps, seeds: of the runs whose losses are compared.
    """

    experiment: str
    peer: str
    checkout: str | None
    shape: str
    batch: Batch
    threads: int
    settings: Settings
    steps: int
    seeds: list[int]
    plan: Plan

    @property
    def ours(self) -> bool:
        return self.peer.startswith("ours")

    def load(self) -> Peer:
        return PEERS[self.peer](*([] if self.checkout is None else [Path(self.checkout)]))


class Side:
    """A peer at a copy of the model's starting weights."""

    def __init__(self, peer: Peer, task: Task, settings: Settings, watch: Watch | None = None):
        self.peer, self.settings = peer, settings
        self.model = copy.deepcopy(task.model)
        self.loss = Loss(task, self.model, watch or Watch(CPU))
        self.step = peer.make(self.model, self.loss, settings)

    def wrong(self) -> str | None:
        """Take a step, and say what is wrong with it."""
        wrong = self.peer.check(self.step, self.loss, self.settings)
        return None if wrong is None else f"{self.peer.title}: {wrong}"


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def apart(spec: Spec) -> list[Row]:
    """Measure in a process of its own: what a peer imports, patches and seeds reaches nobody else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_quietly, spec).result()


def _quietly(spec: Spec) -> list[Row]:
    with redirect_stdout(None):  # a peer may print each step
        return measure(spec)


def measure(spec: Spec) -> list[Row]:
    """The rows of an experiment."""
    peer = spec.load()
    _try(spec, peer)
    torch.set_num_threads(spec.threads)
    task = SHAPES[spec.shape].build(spec.batch, CPU, torch.float32)
    known = {
        "elements": sum(p.numel() for p in task.model.parameters()),
        "peer_version": peer.version,
        "peer_how": peer.how,
        "peer_seeded_by": peer.seeded_by or "none: it counts steps",
    }
    if spec.experiment != "time" and (wrong := Side(peer, task, spec.settings).wrong()):
        raise Wrong(wrong)
    return [known | row for row in EXPERIMENTS[spec.experiment](spec, peer, task)]


def _try(spec: Spec, peer: Peer) -> None:
    """Take one step on a small model.

    Raises:
        Unavailable: the peer's code does not run here.
    """
    side = Side(peer, SHAPES["tiny"].build(SHAPES["tiny"].batch, CPU, torch.float32), spec.settings)
    try:
        side.step()
    except Exception as error:  # whatever other people's code fails by
        raise Unavailable(f"{peer.title} fails here by {type(error).__name__}: {error}") from error


def _time(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    watch = Watch(CPU)
    own, other = (Side(p, task, spec.settings, watch) for p in (ours("in_place"), peer))
    stated = (spec.shape, spec.batch) == _STATED_FOR and not spec.ours
    targets = [Target("ratio", at_least=_FASTER)] if stated else []
    mine, theirs = (Call(side.step, spec.threads, watch) for side in (own, other))
    elements = sum(p.numel() for p in own.model.parameters())
    trial = Trial(mine, lambda: own.wrong() or other.wrong(), [Versus(peer.title, theirs, targets=targets)], elements)
    return compare(trial, spec.plan, CPU)


def _memory(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    """Peaks of a first step, to the byte; extra is beyond what the forwards alone take."""

    def maker(p: Peer) -> Callable[[nn.Module], Step]:
        return lambda own: p.make(own, Loss(task, own, Watch(CPU)), spec.settings)

    def forwards(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(2):
                task.loss(model)

    alone, own, theirs = peak_bytes(task.model, forwards, [maker(ours("in_place")), maker(peer)], CPU)
    row = {
        "correct": True,
        "weights_mib": sum(p.nbytes for p in task.model.parameters()) / _MIB,
        "forwards_peak_memory_mib": alone / _MIB,
        "peak_memory_mib": theirs / _MIB,
        "extra_memory_mib": (theirs - alone) / _MIB,
        "ours_extra_memory_mib": (own - alone) / _MIB,
    }
    bound = Target("ours_extra_memory_mib", at_most=row["extra_memory_mib"] + _SMALL_CHANGE)
    small = spec.shape == "tiny"  # its weights are less than the buffers that any step takes
    return [row | judge(row, [] if small or spec.ours else [bound])]


def _exact(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    """What a user may rely on: weights that come back, runs that repeat, noise that is not the same twice."""

    def stepped(**changed: float) -> nn.Module:
        side = Side(peer, task, replace(spec.settings, **changed))
        side.step()
        return side.model

    start, still, first, zero = map(weights, (task.model, stepped(lr=0.0), model := stepped(), stepped(seed=0)))
    seedable = peer.seeded_by is not None
    off, norm = still - start, partial(torch.linalg.vector_norm, dtype=torch.float64)
    row = {
        "restored_bits": torch.equal(still, start),
        "restored_relative_rms": (norm(off) / norm(start)).item(),
        "restored_largest": off.abs().max().item(),
        "same_seed_same_bits": torch.equal(first, weights(stepped())),
        "other_seed_other_bits": not torch.equal(first, zero) if seedable else None,
        "seed_0_works": torch.equal(zero, weights(stepped(seed=0))) if seedable else None,
        "noise_differs": not noise_repeats(task.model, model),
    }
    promised = ("noise_differs", "other_seed_other_bits", "same_seed_same_bits", "seed_0_works")
    promised += ("restored_bits",) if spec.peer == "ours-in-forward" else ()
    if spec.ours and (broken := [name for name in promised if not row[name]]):
        raise Wrong(f"{peer.title}: {', '.join(broken)} does not hold")
    return [{"correct": True, **row, **judge(row, [])}]


def _loss(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    @torch.no_grad()
    def after(steps: int, seed: int) -> float:
        side = Side(peer, task, replace(spec.settings, seed=seed))
        for _ in range(steps):
            side.step()
        return task.loss(side.model).item()

    seeds = spec.seeds if peer.seeded_by is not None else spec.seeds[:1]  # else all runs are the same
    ends = [after(spec.steps, seed) for seed in seeds]
    row = {
        "correct": True,
        "steps": spec.steps,
        "runs": len(ends),
        "loss_before": after(0, seeds[0]),
        "loss_after": statistics.mean(ends),
        "loss_after_sd": statistics.stdev(ends) if len(ends) > 1 else None,
        "loss_after_largest": max(ends),
    }
    return [row | judge(row, [])]


EXPERIMENTS = {"time": _time, "memory": _memory, "exact": _exact, "loss": _loss}
