"""The three experiments on one peer, ours beside it: time, exactness, loss."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..bench.compare import Trial, Versus, compare
from ..bench.memory import peak_bytes
from ..bench.registry import Row, Target, judge
from ..bench.timing import Call, Plan, Watch
from ..step.shapes import SHAPES, Batch, Task
from .adapters import OURS
from .peer import Loss, Peer, Settings, Step, Unavailable
from .probes import Windows, alike
from .spec import Spec

CPU = torch.device("cpu")
_MIB = 2**20
_FASTER = 3.0
_SMALL_CHANGE = 0.1  # MiB


class Side:
    """A peer at a copy of the model's starting weights."""

    def __init__(self, peer: Peer, task: Task, settings: Settings, watch: Watch | None = None):
        self.peer, self.settings = peer, settings
        self.model = copy.deepcopy(task.model)
        self.loss = Loss(task, self.model, watch or Watch(CPU))
        self.step = peer.make(self.model, self.loss, settings)

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]


def measure(spec: Spec, peer: Peer) -> list[Row]:
    """The rows of an experiment."""
    torch.set_num_threads(spec.threads)
    task = SHAPES[spec.shape].build(Batch(spec.batch, spec.tokens), CPU, torch.float32)
    known = {
        "elements": sum(p.numel() for p in task.model.parameters()),
        "peer_version": peer.version,
        "peer_how": peer.how,
        "peer_seeded_by": peer.seeded_by or "none: it counts steps",
    }
    return [known | row for row in EXPERIMENTS[spec.experiment](spec, peer, task)]


def _time(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    watch = Watch(CPU)
    ours, other = (Side(p, task, spec.settings, watch) for p in (OURS.load(None), peer))

    def check() -> str | None:
        return _wrong(ours) or _wrong(other)

    def call(side: Side) -> Call:
        return Call(side.step, spec.threads, watch)

    targets = [Target("ratio", at_least=_FASTER)] if spec.stated else []
    elements = sum(p.numel() for p in ours.weights())
    trial = Trial(call(ours), check, [Versus(peer.title, call(other), targets=targets)], elements)
    return compare(trial, Plan(spec.rounds, spec.seconds), CPU)


def _wrong(side: Side) -> str | None:
    wrong = side.peer.check(side.step, side.loss, side.settings)
    return None if wrong is None else f"{side.peer.title}: {wrong}"


def _exact(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    if wrong := _wrong(Side(peer, task, spec.settings)):
        return [{"correct": False, "wrong": wrong}]
    conduct = _conduct(peer, task, spec.settings)
    promised = {"same_seed_same_bits", "other_seed_other_bits", "seed_0_works", "noise_differs"}
    promised |= {"restored_bits"} if spec.peer == "ours-in-forward" else set()
    if spec.ours and (broken := sorted(name for name in promised if not conduct[name])):
        return [{"correct": False, "wrong": f"{peer.title}: {', '.join(broken)} does not hold"}]
    return [{"correct": True, **conduct, **judge({}, [])}]


def _memory(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    """Peaks of a first step, to the byte; extra is what the forwards alone do not take."""
    if wrong := _wrong(Side(peer, task, spec.settings)):
        return [{"correct": False, "wrong": wrong}]

    def maker(p: Peer) -> Callable[[nn.Module], Step]:
        return lambda own: p.make(own, Loss(task, own, Watch(CPU)), spec.settings)

    def forwards(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(2):
                task.loss(model)

    alone, ours, theirs = peak_bytes(task.model, forwards, [maker(OURS.load(None)), maker(peer)], CPU)
    row = {
        "correct": True,
        "weights_mib": sum(p.nbytes for p in task.model.parameters()) / _MIB,
        "forwards_peak_memory_mib": alone / _MIB,
        "peak_memory_mib": theirs / _MIB,
        "extra_memory_mib": (theirs - alone) / _MIB,
        "ours_extra_memory_mib": (ours - alone) / _MIB,
    }
    bound = Target("ours_extra_memory_mib", at_most=row["extra_memory_mib"] + _SMALL_CHANGE)
    return [row | judge(row, [bound] if spec.large and not spec.ours else [])]


def _conduct(peer: Peer, task: Task, settings: Settings) -> Row:
    """What a user may rely on: weights that come back, runs that repeat, noise that is not the same twice."""
    start = [p.detach() for p in task.model.parameters()]

    def stepped(settings: Settings) -> Side:
        side = Side(peer, task, settings)
        side.step()
        return side

    still = stepped(replace(settings, lr=0.0)).weights()
    first, zero = stepped(settings), stepped(replace(settings, seed=0))
    windows = Windows(first.model)
    change = windows.read() - Windows(task.model).read()
    off = rms([a.double() - b.double() for a, b in zip(still, start, strict=True)])
    seedable = peer.seeded_by is not None
    return {
        "restored_bits": _equal(still, start),
        "restored_relative_rms": off / rms(start),
        "restored_largest": max((a - b).abs().max().item() for a, b in zip(still, start, strict=True)),
        "same_seed_same_bits": _equal(first.weights(), stepped(settings).weights()),
        "other_seed_other_bits": not _equal(first.weights(), zero.weights()) if seedable else None,
        "seed_0_works": _equal(zero.weights(), stepped(replace(settings, seed=0)).weights()) if seedable else None,
        "noise_differs": not alike(task.model, change),
    }


def rms(tensors: list[Tensor]) -> float:
    """The root of the mean square of all elements."""
    total = sum(t.double().square().sum().item() for t in tensors)
    return (total / sum(t.numel() for t in tensors)) ** 0.5


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _loss(spec: Spec, peer: Peer, task: Task) -> list[Row]:
    if wrong := _wrong(Side(peer, task, spec.settings)):
        return [{"correct": False, "wrong": wrong}]
    with torch.no_grad():
        start = task.loss(task.model).item()
    seeds = spec.seeds if peer.seeded_by is not None else spec.seeds[:1]  # else all runs are the same
    ends = [_run(peer, task, replace(spec.settings, seed=seed), spec.steps) for seed in seeds]
    row = {
        "correct": True,
        "steps": spec.steps,
        "runs": len(ends),
        "loss_before": start,
        "loss_after": statistics.mean(ends),
        "loss_after_sd": statistics.stdev(ends) if len(ends) > 1 else None,
        "loss_after_largest": max(ends),
    }
    return [row | judge(row, [])]


def _run(peer: Peer, task: Task, settings: Settings, steps: int) -> float:
    side = Side(peer, task, settings)
    for _ in range(steps):
        side.step()
    with torch.no_grad():
        return task.loss(side.model).item()


EXPERIMENTS = {"time": _time, "memory": _memory, "exact": _exact, "loss": _loss}


def first_step(spec: Spec, peer: Peer) -> None:
    """Take one step on a small model.

    Raises:
        Unavailable: the peer's code does not run here.
    """
    task = SHAPES["tiny"].build(SHAPES["tiny"].batch, CPU, torch.float32)
    side = Side(peer, task, spec.settings)
    try:
        side.step()
    except Exception as error:  # whatever other people's code fails by
        raise Unavailable(f"{peer.title} fails here by {type(error).__name__}: {error}") from error
