"""Optimizers whose steps are disturbed, and what must hold when the disturbance is over."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import block_mlp, real_loss
from torch import nn

import zo_kernels as zo
from attack.runs import METHODS, SVRG, Bits, bits_of, take
from attack.workers import expect


@dataclass(frozen=True)
class Kind:
    """Of a step.

    Attributes:
        method, options: of the optimizer.
        dtype: of the weights.
        steps: taken before the one that is disturbed, in turn.
        width: of the model.
    """

    method: str = "MeZO"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    steps: tuple[int, ...] = (0, 1, 2)
    width: int = 4

    def model(self) -> nn.Module:
        return block_mlp(depth=2, width=self.width, dtype=self.dtype)

    def build(self, model: nn.Module, path: Path | None = None) -> zo.ZeroOrderOptimizer:
        own = {"lr": 1e-2, "eps": 1e-2, "seed": 5, **(SVRG if self.method == "MeZOSVRG" else {}), **self.options}
        return METHODS[self.method](model, **own, trajectory=path)


FORWARD, PLACE = {"perturb": "in_forward"}, {"perturb": "in_place"}
KINDS = {
    "in place": Kind(),
    "in place, directions": Kind(options={"directions": 2, "weight_decay": 0.1}),
    "in place, sparse": Kind("SparseMeZO", {"sparsity": 0.5}),
    "in place, blocks": Kind("LeZO", {"directions": 2}),
    "in place, bf16": Kind(options={**PLACE, "rounding": "nearest"}, dtype=torch.bfloat16),
    "in forward": Kind(options=FORWARD),
    "in forward, directions, bf16": Kind("LeZO", {**FORWARD, "directions": 2}, dtype=torch.bfloat16),
    "in forward, sparse": Kind("SparseMeZO", FORWARD),
    "streamed": Kind(options={**FORWARD, "execution_device": "cpu"}),
    "streamed, blocks, fp16": Kind("LeZO", {**FORWARD, "execution_device": "cpu"}, dtype=torch.float16),
    "one-sided, in place": Kind("FZOO", {**PLACE, "directions": 3}),
    "one-sided, streamed, rms": Kind(
        options={**FORWARD, "execution_device": "cpu", "normalize": "rms", "estimator": "one_sided"}
    ),
    "svrg in place": Kind("MeZOSVRG", {"directions": 2}, steps=(0, 1, 3)),
    "svrg in place, bf16": Kind("MeZOSVRG", PLACE, dtype=torch.bfloat16, steps=(1, 3)),
    "svrg in forward": Kind("MeZOSVRG", FORWARD, steps=(0, 1, 3)),
    "svrg streamed": Kind("MeZOSVRG", {**FORWARD, "execution_device": "cpu"}, steps=(1, 3)),
}


class Victim:
    """A model and its optimizer, with a file.

    Args:
        kind: of its steps.
        model: to be trained, whose weights are those of the start.
        path: of its trajectory.
        loss: of a step.
    """

    def __init__(self, kind: Kind, path: Path | None = None, model: nn.Module | None = None, loss: Any = None):
        self.kind, self.path = kind, path
        self.model = kind.model() if model is None else model
        self._loss = loss or (lambda data: real_loss(self.model, data))
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.opt = kind.build(self.model, path)
        self._clean = self._around()
        self._mirror = kind.model() if model is None else None

    def step(self) -> Any:
        at = self.opt.step_count
        return take(self.opt, lambda: self._loss(at), lambda: self._loss(1000))

    def failing_step(self, call: int, error: BaseException) -> Any:
        """One whose closure raises at a call."""
        calls = []

        def closure() -> Any:
            calls.append(1)
            if len(calls) == call:
                raise error
            return self._loss(0)

        return take(self.opt, closure)

    def _around(self) -> dict[str, Any]:
        """What a step must leave as it was, besides weights."""
        module = torch.nn.modules.module
        return {
            "hooks of all modules": [
                len(getattr(module, name))
                for name in (
                    "_global_forward_pre_hooks",
                    "_global_forward_hooks",
                    "_global_forward_hooks_always_called",
                )
                if hasattr(module, name)
            ],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()],
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "dispatch modes": torch._C._len_torch_dispatch_stack(),
            "function modes": torch._C._len_torch_function_stack(),
            "signal handlers": [signal.getsignal(s) for s in _HANDLED],
            "signal mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "addresses": [p.data_ptr() for p in self.model.parameters()],
            "forwards": ["forward" in m.__dict__ for m in self.model.modules()],
        }

    def replayed(self) -> Bits:
        mirror = self.kind.model() if self._mirror is None else self._mirror
        with torch.no_grad():
            for p, start in zip(mirror.parameters(), self.start, strict=True):
                p.copy_(start)
        zo.replay(mirror, self.opt.trajectory)
        return bits_of(mirror)

    def check(self, when: str) -> str:
        """What is wrong, else "". In words that begin with how it is counted."""
        if bits_of(self.model) != self.replayed():
            return f"left moved: {when}"
        if (steps := self.opt.trajectory.steps) != self.opt.step_count:
            return f"unrecorded: {when}: step_count {self.opt.step_count}, {steps} steps in the trajectory"
        now = self._around()
        changed = [name for name, value in now.items() if value != self._clean[name]]
        return f"dirty: {when}: {', '.join(changed)} changed" if changed else ""

    def check_after(self, when: str) -> None:
        """Now and after another step."""
        wrong = self.check(when)
        expect(not wrong, wrong)
        count = self.opt.step_count
        try:
            self.step()
        except Exception as error:
            expect(False, f"broken: {when}: the next step raised {type(error).__name__}: {error}")
        expect(self.opt.step_count == count + 1, f"broken: {when}: the next step did not count")
        wrong = self.check(f"{when}, after another step")
        expect(not wrong, wrong)
        if self.path is not None:
            on_file = self.path.read_bytes() == self.opt.trajectory.to_bytes()
            expect(on_file, f"unrecorded: {when}: the file is not the trajectory")


_HANDLED = (signal.SIGINT, signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1)
Handler = Callable[..., Any]
