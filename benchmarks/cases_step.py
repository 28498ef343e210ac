"""`step`: whole steps of the optimizers on a model, against the same steps without zo_kernels."""

from __future__ import annotations

import copy
import importlib.util
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zo_kernels import backends
from zo_kernels.backends.native import instruction_sets

from .compare import Trial, Versus, compare
from .memory import extra_bytes
from .registry import Case, Row, Target
from .shapes import SHAPES, Task
from .step_methods import MEZO, Method, Ours, baseline, methods
from .timing import Call, Plan, Watch

# What is to be reached by MeZO on MiniLM, on a CPU with two threads.
_STATED_FOR = ("minilm", "MeZO", "cpu", 2)
_FORWARDS_SHARE = 0.85
_AGAINST_PUBLISHED = 2.5
# And everywhere, each but for a little: LeZO's passes in proportion to the weights that take part, memory as designed.
_OVER_PROPORTION = 1.1
_IN_PLACE_AGAINST_IN_FORWARD = 1 / 1.1
_MIB = 2**20


def cases(options: Namespace) -> list[Case]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return [
        _case(shape, name, method, device, options)
        for shape in dict.fromkeys(options.shape)
        for name, method in methods(options.anchor_every).items()
    ]


def _case(shape_name: str, method_name: str, method: Method, device: torch.device, options: Namespace) -> Case:
    shape = SHAPES[shape_name]
    batch, tokens = options.batch or shape.batch, options.tokens or shape.tokens
    threads = options.threads if device.type == "cpu" else None
    facts = {
        "backend": options.backend or _default_backend(device),
        "device": str(device),
        "dtype": "float32",
        "threads": threads,
        "shape": shape_name,
        "method": method_name.partition("/")[0],
        "perturb": method.perturb,
        "batch": batch,
        "tokens": tokens,
        "anchor_every": method.anchor_every or None,
    }

    def measure() -> list[Row]:
        torch.set_num_threads(options.threads)
        task = shape.build(batch, tokens, device)
        stated = (shape_name, method_name, device.type, threads) == _STATED_FOR
        trial = _trial(task, method, device, options, stated)
        rows = compare(trial, Plan(options.rounds, options.seconds), device)
        return [{"elements": trial.elements, "active_share": method.active_share(task.model), **row} for row in rows]

    return Case(f"{shape_name}/{method_name}", facts, measure, _skipped(device, options.backend))


def _default_backend(device: torch.device) -> str:
    return f"native:{instruction_sets()[0]}" if device.type == "cpu" and instruction_sets() else "default"


def _skipped(device: torch.device, backend: str | None) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        backends.resolve(backend, device)
    except ValueError as error:
        return str(error)
    return None


class _Maker:
    """Makes the calls of one case."""

    def __init__(self, task: Task, method: Method, device: torch.device, options: Namespace):
        self.task, self.method, self.device, self.options = task, method, device, options
        self.watch = Watch(device)
        self.first = self.ours(task.model)

    def _loss_of(self, model: nn.Module) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with self.watch.part("forwards"):
                return self.task.loss(model)

        return loss

    def call(self, run: Callable[[], object], steps: int | None = None) -> Call:
        return Call(run, self.options.threads, self.watch, steps or self.method.steps)

    def ours(self, model: nn.Module, method: Method | None = None) -> Ours:
        return Ours(method or self.method, model, self._loss_of(model), self.watch, self.options.backend)

    def baseline(self, model: nn.Module, published: bool) -> Callable[[], None]:
        return baseline(self.method, model, self._loss_of(model), self.watch, self.first, published=published)

    def extra_mib(self, *makers: Callable[[nn.Module], Callable[[], object]]) -> list[float]:
        """Of a step of ours, and of what the makers make."""
        every = [lambda model: self.ours(model).run, *makers]
        found = extra_bytes(self.task.model, partial(_forwards, self.task), every, self.device)
        return [memory / _MIB for memory in found]


def _trial(task: Task, method: Method, device: torch.device, options: Namespace, stated: bool) -> Trial:
    make = _Maker(task, method, device, options)
    versus = _against_in_place(make) if method.perturb == "in_forward" else _against_others(make, stated)
    elements = sum(p.numel() for p in task.model.parameters())
    return Trial(make.call(make.first.run), make.first.check, versus, elements)


def _memory_target(make: _Maker) -> Target:
    return Target("extra_memory_mib", at_most=make.method.extra_bytes(make.task.model) / _MIB + 1)


def _against_others(make: _Maker, stated: bool) -> list[Versus]:
    """A step in place against the same step without zo_kernels."""
    model, method = make.task.model, make.method
    memory, *of_baselines = make.extra_mib(lambda own: make.baseline(own, True), lambda own: make.baseline(own, False))
    other = copy.deepcopy(model)  # the baselines' own, since they replace the memory of the weights
    published, eager = (make.call(make.baseline(other, published)) for published in (True, False))
    targets = [_memory_target(make)]
    if stated:
        targets += [Target("ratio", _AGAINST_PUBLISHED), Target("forwards_share", _FORWARDS_SHARE)]
    facts = [{"extra_memory_mib": memory, "baseline_extra_memory_mib": b} for b in of_baselines]
    versus = [
        Versus("published passes", published, targets=targets, facts=facts[0]),
        Versus("eager passes", eager, facts=facts[1]),
    ]
    if method.drop:
        mezo = make.call(make.ours(model, MEZO).run, 1)
        bound = Target("ratio", 1 / (_OVER_PROPORTION * method.active_share(model)))
        versus.append(Versus("MeZO", mezo, "passes", [bound], {"extra_memory_mib": memory}))
    return versus


def _against_in_place(make: _Maker) -> list[Versus]:
    """A step in the forward against the same step in place."""
    in_place = make.method.in_place
    memory, of_in_place = make.extra_mib(lambda own: make.ours(own, in_place).run)
    other = make.call(make.ours(copy.deepcopy(make.task.model), in_place).run)
    targets = [_memory_target(make), Target("ratio", _IN_PLACE_AGAINST_IN_FORWARD)]
    facts = {"extra_memory_mib": memory, "baseline_extra_memory_mib": of_in_place}
    return [Versus("in place", other, targets=targets, facts=facts)]


@torch.no_grad()
def _forwards(task: Task, model: nn.Module) -> None:
    for _ in range(2):
        task.loss(model)


def cells(row: Row) -> dict[str, str]:
    parts = {part: f"{row[f'{part}_seconds_median'] * 1e3:,.1f}" for part in ("forwards", "passes", "other")}
    return {
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        **parts,
        "forwards' share": f"{row['forwards_share']:.1%}",
        "extra MiB": f"{row['extra_memory_mib']:.2f}",
    }
