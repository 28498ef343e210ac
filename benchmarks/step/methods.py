"""The methods whose steps are timed: the optimizer, the memory it may take, and the same steps without zo_kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import ops
from zo_kernels.weights.blocks import find_blocks

from ..bench.timing import Watch
from .exact import wrong_step

EPS, LR = 1e-3, 1e-5


@dataclass(frozen=True)
class Method:
    """An optimizer's settings.

    Args:
        make: its class.
        sparsity, drop: shares of the weights and of the blocks that it leaves alone.
        anchor_every: steps from anchor to anchor, 0 for methods without.
        directions: of a step.
        one_sided: whether directions share one loss at θ, as FZOO's do.
        perturb: where it perturbs.
        distribution: of its directions.
    """

    make: Callable[..., zo.ZeroOrderOptimizer]
    sparsity: float = 0.0
    drop: float = 0.0
    anchor_every: int = 0
    directions: int = 1
    one_sided: bool = False
    perturb: str = "in_place"
    distribution: str = "normal"

    @property
    def steps(self) -> int:
        """How many steps one timed call takes: all from one anchor of MeZO-SVRG to the next, since they differ."""
        return self.anchor_every or 1

    @property
    def forwards_per_step(self) -> float:
        """Evaluations of the loss; MeZO-SVRG's full-batch step has two, each of its others four."""
        if self.anchor_every:
            return (4 * self.anchor_every - 2) / self.anchor_every
        return self.directions + 1 if self.one_sided else 2 * self.directions

    def optimizer(self, model: nn.Module, backend: str | None) -> zo.ZeroOrderOptimizer:
        anchored: Any = {"anchor_lr": LR, "anchor_every": self.anchor_every} if self.anchor_every else {}
        given = {"sparsity": self.sparsity, "drop": self.drop, "perturb": self.perturb, "backend": backend}
        given |= {"directions": self.directions, "distribution": self.distribution}
        return self.make(model, lr=LR, eps=EPS, **{name: v for name, v in given.items() if v}, **anchored)

    def dropped(self, model: nn.Module) -> int:
        """Blocks that sit out a step."""
        return round(self.drop * len(find_blocks(model))) if self.drop else 0

    def active_share(self, model: nn.Module) -> float:
        """The share of the weights that lie in tensors or rows a pass visits; a magnitude mask visits all."""
        total = sum(p.numel() for p in model.parameters())
        blocks = find_blocks(model) if self.drop else []
        in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
        return 1.0 - in_blocks * self.dropped(model) / len(blocks) / total if blocks else 1.0

    def extra_bytes(self, model: nn.Module) -> int:
        """Memory beyond the forward's own that the design allows, but for small change."""
        parameters = list(model.parameters())
        extra = 0
        if self.anchor_every:
            extra += sum(p.nbytes for p in parameters)
        if self.sparsity and (self.anchor_every or self.perturb == "in_place"):
            extra += sum(p.numel() for p in parameters) // 8
        if self.perturb == "in_forward":
            extra += max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
        return extra


MEZO = Method(zo.MeZO)
# The first steps in the forward look for weights that are read elsewhere and build tables. They are slower than all
# later ones, so they are not timed.
_WATCHED = 17


def methods(anchor_every: int, directions: int, distributions: Sequence[str] = ("normal",)) -> dict[str, Method]:
    """Every method by its name; those whose directions are random signs have a name that ends with it.

    `directions` are FZOO's, the others have one.
    """
    in_place = {"MeZO": MEZO, "SparseMeZO": Method(zo.SparseMeZO, sparsity=0.75), "LeZO": Method(zo.LeZO, drop=0.75)}
    in_place["MeZOSVRG"] = Method(zo.MeZOSVRG, anchor_every=anchor_every)
    in_place["FZOO"] = Method(zo.FZOO, directions=directions, one_sided=True)
    every = in_place | {f"{name}/in_forward": replace(m, perturb="in_forward") for name, m in in_place.items()}
    return {
        name if distribution == "normal" else f"{name}/{distribution}": replace(m, distribution=distribution)
        for distribution in distributions
        for name, m in every.items()
    }


class Ours:
    """Steps of one of our optimizers on a model.

    Its passes are noted under "passes" of the watch; the loss notes the forwards.
    """

    def __init__(
        self, method: Method, model: nn.Module, loss: Callable[[], Tensor], watch: Watch, backend: str | None = None
    ):
        self._method, self._model, self._loss, self._watch = method, model, loss, watch
        self.optimizer = method.optimizer(model, backend)

    def run(self, closure: Callable[[], Tensor] | None = None, watch: Watch | None = None) -> None:
        """Take a step, or a round of MeZO-SVRG. All passes of the optimizers go through `ops.Table.apply`."""
        closures = (closure or self._loss,) * (2 if self._method.anchor_every else 1)
        watch, apply = watch or self._watch, ops.Table.apply

        def watched(*arguments: Any, **options: Any) -> None:
            with watch.part("passes"):
                apply(*arguments, **options)

        with mock.patch.object(ops.Table, "apply", watched):
            for _ in range(self._method.steps):
                self.optimizer.step(*closures)

    def check(self) -> str | None:
        """Run, and say where the weights leave the method's formula, or None. Later steps may be timed."""
        wrong = wrong_step(self.optimizer, self._model, self._loss, self.run)
        while wrong is None and self._method.perturb == "in_forward" and self.optimizer.step_count <= _WATCHED:
            self.run()
        return wrong
