"""First order beside MeZO, and its costs: AdamW on all weights and on low-rank adapters (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_kernels.weights.blocks import find_blocks

from ...bench.memory import peak_bytes
from ...bench.registry import Row
from ..intervals import ratio
from ..learning import Arm, to_loss
from .study import Equal

RANK, ALPHA = 8, 16.0
_FORWARDS = 3  # a backward counts as two
_TIMED = 20  # steps
_TOLERANCE = 1e-5


class Adapted(nn.Module):
    """linear(x) + α/r · B A x, where only A (r, in), normal with variance 1/in, and B (out, r), 0 at first, learn."""

    def __init__(self, linear: nn.Linear, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        out, given = linear.weight.shape
        start = torch.randn(RANK, given, generator=generator) / math.sqrt(given)
        self.a = nn.Parameter(start.to(linear.weight))
        self.b = nn.Parameter(linear.weight.new_zeros(out, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (ALPHA / RANK) * F.linear(F.linear(x, self.a), self.b)


def adapt(model: nn.Module, seed: int) -> list[nn.Parameter]:
    """Give every linear layer of the blocks an adapter; return these, and the weights of a classifier's head.

    All other weights are frozen.
    """
    generator, found = torch.Generator().manual_seed(seed), list[nn.Parameter]()
    model.requires_grad_(False)
    for block in find_blocks(model):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    adapted = Adapted(child, generator)
                    setattr(parent, name, adapted)
                    found += [adapted.a, adapted.b]
    if hasattr(model, "encoder"):
        found += model.head.parameters()
    for p in found:
        p.requires_grad_(True)
    return found


class FirstOrder:
    """AdamW without weight decay, on all weights that are trained or on `adapters`."""

    def __init__(self, model: nn.Module, lr: float, seed: int, *, adapters: bool):
        self.params = adapt(model, seed) if adapters else [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.params, lr=lr, weight_decay=0.0)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = closure()
            if not math.isfinite(loss.item()):
                raise ValueError(f"expected a finite loss, got {loss.item()}")
            loss.backward()
        self._optimizer.step()
        return loss.detach()


def first_order(name: str, *, adapters: bool, guess: float) -> Arm:
    facts: Row = {"rank": RANK, "alpha": ALPHA} if adapters else {}
    return Arm(name, partial(FirstOrder, adapters=adapters), _wrong, facts=facts, forwards=_FORWARDS, guess=guess)


def _wrong(steps: FirstOrder, model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """Its first step is to move each weight by -lr g / (|g| + ε), and no other; adapters change no loss before."""
    group = steps._optimizer.param_groups[0]
    known, own = dict(model.named_parameters()), set(map(id, steps.params))
    before = {name: p.detach().clone() for name, p in known.items()}
    steps.step(loss)
    for name, p in known.items():
        g = torch.zeros_like(p) if p.grad is None or id(p) not in own else p.grad
        wanted = before[name] - group["lr"] * g / (g.abs() + group["eps"])
        if not torch.allclose(p.detach(), wanted, rtol=0.0, atol=_TOLERANCE * (1 + group["lr"])):
            return f"{name}: its first step is not AdamW's"
    return None


def costs(study: Equal, arm: Arm, dense: Arm) -> Row:
    """A step's time beside that of `dense`, by the processor's clock in pairs; its peak memory beyond the weights.

    `step_seconds`, `step_time_ratio`: medians. `time_to_loss_*`: the time to the higher of the two final losses, in
    parts of the time of `dense`. `memory_mib`: the peak of a step minus `weights_mib`, as PyTorch allocates it.
    """
    task, seed = study.task, study.seeds[0]
    lrs = {made.name: study.result(made).lr for made in (arm, dense)}

    def stepping(made: Arm, model: nn.Module) -> Callable[[], Any]:
        optimizer, closures = made.make(model, lrs[made.name], seed), task.closures(model, seed)
        optimizer.step(next(closures))  # its state is there from now on
        return lambda: optimizer.step(next(closures))

    with torch.no_grad():
        pair = [stepping(made, task.model(seed)) for made in (arm, dense)]
        seconds = [[_seconds(step) for step in pair] for _ in range(_TIMED)]
        model = task.model(seed)
        weights = sum(t.nbytes for t in model.state_dict().values())
        peaks = peak_bytes(
            model,
            lambda own: next(task.closures(own, seed))(),
            [partial(stepping, arm)],
            next(model.parameters()).device,
        )
    share = median(own / its for own, its in seconds)
    found = to_loss(study.result(arm).curves, study.result(dense).curves, share)
    mib = {"weights_mib": weights, "forward_memory_mib": peaks[0] - weights, "memory_mib": peaks[1] - weights}
    return {
        "step_seconds": median(own for own, _ in seconds),
        "step_time_ratio": share,
        "trained": sum(p.numel() for p in _trained(arm, task.model(seed))),
        **ratio(*found, "time_to_loss"),
        **{name: size / 2**20 for name, size in mib.items()},
    }


def _trained(arm: Arm, model: nn.Module) -> list[nn.Parameter]:
    arm.make(model, 1e-3, 0)
    return [p for p in model.parameters() if p.requires_grad]


def _seconds(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start
