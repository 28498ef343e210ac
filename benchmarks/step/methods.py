"""The methods whose steps are timed: the optimizer, the formula it is checked by, and the memory it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import ops
from zo_kernels.weights.blocks import find_blocks

from ..bench.timing import Watch
from ..kernels.baselines import EagerPass, published_pass
from . import check as step_check
from .baseline_steps import Baseline
from .check import Walk, Windows
from .exact import exact_spsa

EPS, LR = 1e-3, 1e-5
_ANCHOR_LR = 1e-5


@dataclass(frozen=True)
class Method:
    """An optimizer's settings.

    Args:
        make: its class.
        sparsity, drop: what it leaves alone.
        anchor_every: steps from anchor to anchor, 0 for methods without.
        perturb: where.
    """

    make: Callable[..., zo.ZeroOrderOptimizer]
    sparsity: float = 0.0
    drop: float = 0.0
    anchor_every: int = 0
    perturb: str = "in_place"

    @property
    def in_place(self) -> Method:
        return replace(self, perturb="in_place")

    @property
    def steps(self) -> int:
        """That make up one timed call: the steps of MeZO-SVRG differ within a round from anchor to anchor."""
        return self.anchor_every or 1

    @property
    def options(self) -> dict[str, Any]:
        given: dict[str, Any] = {"sparsity": self.sparsity, "drop": self.drop, "perturb": self.perturb}
        if self.anchor_every:
            given |= {"anchor_lr": _ANCHOR_LR, "anchor_every": self.anchor_every}
        return {name: value for name, value in given.items() if value}

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

    def walk(self, windows: Windows, theta: Tensor, model: nn.Module) -> Walk:
        """The formula of what one timed call does; to the last bit where weights of 16 bits make a formula say little,
        except for MeZO-SVRG.
        """
        if self.anchor_every:
            return step_check.svrg(windows, theta, EPS, LR, _ANCHOR_LR, self.steps)

        mask_of_weights = torch.ones_like(theta)
        if self.sparsity:  # told by the clean weights, so now
            mask_of_weights = step_check.magnitude_mask(windows, theta, self.sparsity)

        def mask() -> Tensor:
            if self.drop:  # told by what the first pass has changed
                return mask_of_weights * step_check.block_mask(windows, theta, find_blocks(model), self.dropped(model))
            return mask_of_weights

        if self.exact(windows.dtype):
            return exact_spsa(windows, theta, mask)
        return step_check.spsa(windows, theta, mask, EPS, LR)

    def exact(self, dtype: torch.dtype) -> bool:
        """Whether the walk is."""
        return dtype != torch.float32 and not self.anchor_every


MEZO = Method(zo.MeZO)
# In its first steps, perturbation in the forward gets to know what runs: it looks for weights that are read elsewhere,
# and builds tables. They are slower than the thousands of others, and are not to be timed.
_WATCHED = 17


def methods(anchor_every: int) -> dict[str, Method]:
    in_place = {
        "MeZO": MEZO,
        "SparseMeZO": Method(zo.SparseMeZO, sparsity=0.75),
        "LeZO": Method(zo.LeZO, drop=0.75),
        "MeZOSVRG": Method(zo.MeZOSVRG, anchor_every=anchor_every),
    }
    return in_place | {f"{name}/in_forward": replace(m, perturb="in_forward") for name, m in in_place.items()}


class Ours:
    """Steps of one of our optimizers.

    Args:
        method: which.
        model: its weights are changed.
        loss: of the model; notes its time under "forwards".
        watch: the passes note theirs under "passes".
        backend: of zo_kernels.
    """

    def __init__(
        self, method: Method, model: nn.Module, loss: Callable[[], Tensor], watch: Watch, backend: str | None = None
    ):
        self._method, self._model, self._loss, self._watch = method, model, loss, watch
        self.optimizer = method.make(model, lr=LR, eps=EPS, backend=backend, **method.options)

    def run(self, closure: Callable[[], Tensor] | None = None, watch: Watch | None = None) -> None:
        closure = closure or self._loss
        closures = (closure, closure) if self._method.anchor_every else (closure,)
        with _passes_watched(watch or self._watch):
            for _ in range(self._method.steps):
                self.optimizer.step(*closures)

    def check(self) -> str | None:
        """Run, and say where the weights leave the method's formula. Steps that are taken later are ordinary ones."""
        windows = Windows(self.optimizer, self._model)
        theta = windows.read()
        try:
            walk = self._method.walk(windows, theta, self._model)
            limit = step_check.rounding(theta, EPS, windows.dtype)
            if self._method.exact(windows.dtype):
                limit = torch.zeros_like(limit)
            check = step_check.Check(windows, walk, self._loss, limit)
            self.run(check.closure)
            check.finish()
            while self._method.perturb == "in_forward" and self.optimizer.step_count <= _WATCHED:
                self.run()
        except step_check.WrongWeights as error:
            return str(error)
        return None


@contextmanager
def _passes_watched(watch: Watch) -> Iterator[None]:
    """All passes of the optimizers go through `ops.Table.apply`; within this context they are watched."""
    apply = ops.Table.apply

    def watched(*arguments: Any, **options: Any) -> None:
        with watch.part("passes"):
            apply(*arguments, **options)

    ops.Table.apply = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ops.Table.apply = apply  # type: ignore[method-assign]


def baseline(
    method: Method, model: nn.Module, loss: Callable[[], Tensor], watch: Watch, ours: Ours, *, published: bool
) -> Callable[[], None]:
    """The same steps by MeZO's published passes, or by the best eager ones; they replace the memory of the parameters.

    The thresholds are those that `ours` found for its model, of which `model` is a copy.
    """
    params = list(model.parameters())
    steps = Baseline(
        params,
        published_pass if published else EagerPass(params),
        not published,
        loss,
        watch,
        EPS,
        LR,
        ours.optimizer.state_dict()["zo"]["thresholds"],
        [list(b.parameters()) for b in find_blocks(model)] if method.drop else [],
        method.dropped(model),
    )
    return (lambda: steps.svrg(method.steps)) if method.anchor_every else steps.spsa
