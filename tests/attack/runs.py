"""Small runs that are attacked: every method, with what else a trajectory may hold."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import check_every
from models import block_mlp, real_loss
from torch import Tensor, nn

import zo_kernels as zo
from attack.layout import CHECK, INTERRUPTED, SETUP, Part, parts_of

METHODS = {"MeZO": zo.MeZO, "SparseMeZO": zo.SparseMeZO, "LeZO": zo.LeZO, "MeZOSVRG": zo.MeZOSVRG, "FZOO": zo.FZOO}
SIGNS = {"distribution": "rademacher"}
KEPT = {"sparsity": 0.5, "mask": "kept"}
SVRG = {"anchor_every": 3, "anchor_lr": 1e-2}
Bits = tuple[bytes, ...]


class Stopped(Exception):
    """What an interrupted closure raises."""


@dataclass(frozen=True)
class Run:
    """How a run is made.

    Attributes:
        method, options: of the optimizer.
        dtype: of the weights.
        groups: 1: the module itself; 2: two groups of its parameters, with rates of their own.
        double: losses that float32 does not hold.
        steps: attempts to take one.
        interrupted: attempts in which the closure raises, and at which call.
        refused: step counts whose loss is not finite.
        eps_at: step counts before which eps changes, which begins a new setup.
        check_every: steps between fingerprints in the file.
    """

    method: str = "MeZO"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    groups: int = 1
    double: bool = False
    steps: int = 10
    interrupted: dict[int, int] = field(default_factory=dict)
    refused: tuple[int, ...] = ()
    eps_at: tuple[int, ...] = ()
    check_every: int = 1000

    def model(self) -> nn.Module:
        return block_mlp(depth=2, width=2, dtype=self.dtype)

    def build(self, model: nn.Module, **options: Any) -> zo.ZeroOrderOptimizer:
        params: Any = model
        if self.groups == 2:
            named = list(model.named_parameters())
            params = [{"params": named[:5], "lr": 3e-3, "weight_decay": 0.1}, {"params": named[5:]}]
        own = {"lr": 1e-2, "eps": 1e-2, "seed": 11, **(SVRG if self.method == "MeZOSVRG" else {}), **self.options}
        return METHODS[self.method](params, **{**own, **options})

    def attempt(self, opt: zo.ZeroOrderOptimizer, model: nn.Module, stop_at: int | None = None) -> None:
        """One step on data that go by the step count; refused ones raise nothing."""
        step, calls = opt.step_count, 0
        if step in self.eps_at:
            for group in opt.param_groups:
                group["eps"] = 2e-2

        def loss(data: int) -> Tensor:
            nonlocal calls
            if calls == stop_at:
                raise Stopped
            calls += 1
            value = real_loss(model, data)
            if step in self.refused and calls == 2:
                return value * float("nan")
            return value.double() * 1.0000000001 if self.double else value

        try:
            take(opt, lambda: loss(step), lambda: loss(1000))
        except ValueError:
            if step not in self.refused or opt.step_count != step + 1:
                raise


def take(opt: zo.ZeroOrderOptimizer, closure: Callable[[], Any], full: Callable[[], Any] | None = None) -> Any:
    return opt.step(closure, full or closure) if isinstance(opt, zo.MeZOSVRG) else opt.step(closure)


RUNS = {
    "plain": Run(interrupted={3: 1, 9: 0}, refused=(5,), check_every=4),
    "groups": Run(groups=2, options={"directions": 3}, double=True, steps=6, interrupted={2: 3}, eps_at=(4,)),
    "sparse": Run("SparseMeZO", {"perturb": "in_forward", **SIGNS}, interrupted={4: 1}, refused=(2,), check_every=3),
    "blocks": Run("LeZO", {"weight_decay": 0.1}, dtype=torch.bfloat16, steps=8, interrupted={7: 0}),
    "svrg": Run("MeZOSVRG", {"directions": 2, **SIGNS}, interrupted={2: 3, 6: 1}, refused=(4,), eps_at=(5,)),
    "svrg apart": Run(
        "MeZOSVRG", {"perturb": "in_forward", "shared_direction": False, **KEPT, "anneal": 2}, steps=8, check_every=2
    ),
    "16 bits": Run("MeZO", {"perturb": "in_place"}, dtype=torch.bfloat16, interrupted={1: 1, 2: 0}, double=True),
    "one-sided": Run("FZOO", {"directions": 3}, interrupted={3: 2, 9: 0}, refused=(5,), check_every=4),
    "normalized": Run(
        options={"normalize": "rms", "estimator": "one_sided"}, groups=2, double=True, eps_at=(4,), interrupted={2: 1}
    ),
    "long": Run(steps=400, interrupted={100: 1, 333: 1}, eps_at=(200,), check_every=50),
}


@dataclass(frozen=True)
class Recorded:
    """A run that was taken.

    Attributes:
        run: how.
        data: its file.
        parts, ends: of it, and the byte at which each ends.
        states: the weights' bits before the first attempt and after each.
        counts: the step count likewise.
    """

    run: Run
    data: bytes
    parts: list[Part]
    ends: list[int]
    states: list[Bits]
    counts: list[int]

    def attempts_within(self, size: int, *, settled: bool = False) -> int:
        """How many attempts the file's first bytes have whole; `settled`: without interrupted ones at its end, which a
        resumed run does not repeat.
        """
        kinds = [p.kind for p, end in zip(self.parts, self.ends, strict=True) if end <= size]
        if settled:
            while kinds and kinds[-1] == INTERRUPTED:
                kinds.pop()
        return sum(kind not in (SETUP, CHECK) for kind in kinds)

    def boundary(self, size: int) -> int:
        """The end of the last whole record within so many bytes."""
        return max((end for end in self.ends if end <= size), default=8 if size >= 8 else 0)

    def settled_boundary(self, size: int) -> int:
        """As `boundary`, without interrupted steps at the end."""
        at = sum(end <= size for end in self.ends)
        while at and self.parts[at - 1].kind == INTERRUPTED:
            at -= 1
        return self.ends[at - 1] if at else (8 if size >= 8 else 0)

    def size_at(self, boundary: int) -> int:
        """Bytes of the record that begins there; beyond the end, of the longest but for setups."""
        for part, end in zip(self.parts, self.ends, strict=True):
            if end - part.size == boundary or boundary < 8:
                return part.size + (8 - boundary if boundary < 8 else 0)
        return max((p.size for p in self.parts if p.kind != SETUP), default=8)


def bits_of(model: nn.Module) -> Bits:
    return tuple(p.detach().view(torch.uint8).numpy().tobytes() for p in model.parameters())


@cache
def recorded(name: str) -> Recorded:
    """A run, taken once in a process."""
    run = RUNS[name]
    model = run.model()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        check_every(patch, run.check_every)
        opt = run.build(model, trajectory=Path(folder) / "run.zo")
        states, counts = [bits_of(model)], [0]
        for i in range(run.steps):
            with contextlib.suppress(Stopped):
                run.attempt(opt, model, run.interrupted.get(i))
            states.append(bits_of(model))
            counts.append(opt.step_count)
        data = (Path(folder) / "run.zo").read_bytes()
    parts = parts_of(data, run.groups)
    ends, at = [], 8
    for part in parts:
        at += part.size
        ends.append(at)
    return Recorded(run, data, parts, ends, states, counts)


def replayed(run: Run, trajectory: Any) -> Bits:
    """The weights that a trajectory gives."""
    model = run.model()
    zo.replay(model, trajectory)
    return bits_of(model)


def state_of(opt: zo.ZeroOrderOptimizer) -> Any:
    """All of an optimizer that an error must not change, as text."""
    state = copy.deepcopy(opt.state_dict())
    return repr([state["zo"], [sorted(g.items()) for g in state["param_groups"]], opt.trajectory.to_bytes()])
