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
        "method": method_name,
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


def _trial(task: Task, method: Method, device: torch.device, options: Namespace, stated: bool) -> Trial:
    watch = Watch(device)

    def loss_of(model: nn.Module) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with watch.part("forwards"):
                return task.loss(model)

        return loss

    def call(run: Callable[[], object], steps: int) -> Call:
        return Call(run, options.threads, watch, steps)

    def make_ours(model: nn.Module, method: Method = method) -> Ours:
        return Ours(method, model, loss_of(model), watch, options.backend)

    def make_baseline(model: nn.Module, published: bool) -> Callable[[], None]:
        return baseline(method, model, loss_of(model), watch, ours, published=published)

    ours = make_ours(task.model)
    memory, *memory_of_baselines = extra_bytes(
        task.model,
        partial(_forwards, task),
        [
            lambda model: make_ours(model).run,
            lambda model: make_baseline(model, True),
            lambda model: make_baseline(model, False),
        ],
        device,
    )
    other = copy.deepcopy(task.model)  # the baselines' own, since they replace the memory of the weights
    published, eager = (call(make_baseline(other, published), method.steps) for published in (True, False))

    targets = [Target("extra_memory_mib", at_most=method.extra_bytes(task.model) / _MIB + 1)]
    if stated:
        targets += [Target("ratio", _AGAINST_PUBLISHED), Target("forwards_share", _FORWARDS_SHARE)]
    facts = [{"extra_memory_mib": memory / _MIB, "baseline_extra_memory_mib": b / _MIB} for b in memory_of_baselines]
    versus = [
        Versus("published passes", published, targets=targets, facts=facts[0]),
        Versus("eager passes", eager, facts=facts[1]),
    ]
    if method.drop:
        mezo = call(make_ours(task.model, MEZO).run, 1)
        bound = Target("ratio", 1 / (_OVER_PROPORTION * method.active_share(task.model)))
        versus.append(Versus("MeZO", mezo, "passes", [bound], {"extra_memory_mib": memory / _MIB}))
    elements = sum(p.numel() for p in task.model.parameters())
    return Trial(call(ours.run, method.steps), ours.check, versus, elements)


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
