"""What a peer is to these benchmarks: something that makes steps of SPSA on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..bench.timing import Watch
from ..step.shapes import Task

Step = Callable[[], object]
STRIDE = 1_000_003  # between the first steps' seeds of two runs, for peers that are given one for each step


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Settings:
    """What all peers are given alike."""

    lr: float
    eps: float
    seed: int


class Loss:
    """The closure that a peer evaluates.

    Args:
        task: whose loss.
        model: the task's, or a copy.
        watch: notes the calls as "forwards".

    Attributes:
        observer: is shown each value while the weights are as the peer has put them.
    """

    def __init__(self, task: Task, model: nn.Module, watch: Watch):
        self._task, self.model, self._watch = task, model, watch
        self.observer: Callable[[Tensor], None] | None = None

    def __call__(self) -> Tensor:
        with self._watch.part("forwards"):
            loss = self._task.loss(self.model)
        if self.observer is not None:
            self.observer(loss)
        return loss


@dataclass(frozen=True)
class Peer:
    """A package, ready to run.

    Args:
        title: in tables and figures.
        make: a step on the model, which calls the loss; a new one starts from the beginning.
        check: takes a step, and says where it leaves what a step of SPSA is.
        seeded_by: how a user chooses the noise; None if no one can.
        version: or commit.
        how: what of it runs, and what stands in for what cannot run here.
    """

    title: str
    make: Callable[[nn.Module, Loss, Settings], Step]
    check: Callable[[Step, Loss, Settings], str | None]
    seeded_by: str | None
    version: str | None = None
    how: str | None = None
