"""Perturbation in the forward: modules run on perturbed copies of their weights, and only updates write θ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from ..closures.losses import Refused
from ..interrupts import Call
from ..warn import Warner
from ..weights.rows import Row, Seed
from ..weights.shards import is_sharded
from ..weights.tables import Weights
from .engine import Engine
from .place import Probes
from .reads.watch_policy import is_sampled


def cannot_perturb_in_forward(module: nn.Module | None) -> str | None:
    """Say why perturbation in the forward is impossible for what the optimizer was given; None if it is possible."""
    if module is None:
        return "it needs the module, not its parameters alone"
    if any(is_sharded(p) for p in module.parameters()):
        return (
            "the weights are sharded, so that no process has a module's whole weights (keep float32 shards, and let "
            "FSDP's MixedPrecisionPolicy cast what it gathers)"
        )
    for name, m in module.named_modules():
        if isinstance(m, nn.DataParallel):
            return "nn.DataParallel runs copies of the module; start a process for each device (torchrun) instead"
        if type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None:
            return f"{name or type(m).__name__} is compiled by torch.compile, which runs no module by itself"
    return None


class InForward:
    """The place `perturb="in_forward"`: see `place.Place`.

    Attributes:
        engine: runs modules on copies of their weights.
    """

    name = "in_forward"

    def __init__(self, engine: Engine, weights: Weights, warner: Warner):
        self.engine, self._weights, self._warner = engine, weights, warner

    def probes(
        self,
        active: Sequence[int] | None,
        *,
        seed: int,
        step: int,
        guarded: bool,
        from_anchor: bool,
        restore: Callable[[], None] | None,
    ) -> Probes:
        watch = is_sampled(seed, step)
        options: Any = {"step": step, "warner": self._warner, "watch": watch, "from_anchor": from_anchor}
        return InForwardProbes(self.engine, self._weights, active, **options)

    def restore(self) -> None:
        self.engine.restore()

    def is_still(self) -> bool:
        return self.engine.is_still()

    def writes(self) -> tuple[set[int], bool]:
        return self.engine.watch_policy.take_findings()

    def unperturbed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def memory_in_use(self) -> list[Any]:
        return [self.engine, self.engine.memory_in_use()]


class InForwardProbes:
    """Probes in the forward: nothing moves until the update."""

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        active: Sequence[int] | None,
        *,
        step: int,
        warner: Warner,
        from_anchor: bool = False,
        watch: bool = False,
    ):
        self._engine, self._weights, self._active = engine, weights, active
        self._step, self._warner = step, warner
        self._from_anchor, self._watch = from_anchor, watch
        self._offset: Mapping[Seed, float] = {}
        self.moves = 0

    def to(self, offset: Mapping[Seed, float]) -> None:
        self._offset = offset
        if offset:
            self.moves += 1
        else:
            self._engine.restore()

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        # At θ no weight takes part: no copies are made.
        do = self._weights.describe(self._offset, None, self._active if self._offset or self._from_anchor else ())
        return self._engine.evaluate(
            closure, do, step=self._step, from_anchor=self._from_anchor, watch=self._watch, missed=self._report_missed
        )

    def _report_missed(self, names: str) -> None:
        """Report weights that were read unperturbed, perhaps in all steps since the last watched one."""
        watch_policy = self._engine.watch_policy
        if watch_policy.watched < self._step:
            self._warner.warn(
                "reads that were missed",
                f"closure: it reads {names or 'weights'} outside of their module by means that are noticed in some "
                f"steps alone: up to {self._step - watch_policy.watched} steps before this one may have taken their "
                "losses at weights that were not all perturbed; use perturb='in_place', or read them in their "
                "module's forward",
            )
        if watch_policy.not_watched == self._step:  # this step's earlier losses are wrong too
            raise Refused(ValueError, f"it reads {names or 'weights'} outside of their module")

    def finish(self, update: Mapping[Seed, Row], decays: Row, then: Sequence[Call]) -> None:
        self._weights.move(update, decays=decays, active=self._active, then=then)
