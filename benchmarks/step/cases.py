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

from ..bench.compare import Trial, Versus, compare
from ..bench.memory import peak_bytes
from ..bench.registry import Case, Row, Target
from ..bench.timing import Call, Plan, Watch
from .graphed import graphed
from .launches import Ranges, counted
from .methods import MEZO, Method, Ours, baseline, methods
from .shapes import SHAPES, Batch, Shape, Task

# What is to be reached by MeZO on MiniLM, on a CPU with two threads.
_STATED_FOR = ("minilm", "MeZO", "cpu", 2, torch.float32)
_FORWARDS_SHARE = 0.85
_AGAINST_PUBLISHED = 2.5
# And everywhere, each but for a little: LeZO's passes in proportion to the weights that take part, memory as designed.
_OVER_PROPORTION = 1.1
_IN_PLACE_AGAINST_IN_FORWARD = 1 / 1.1
_MIB = 2**20
NO_TRANSFORMERS = "transformers is not installed"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cases(options: Namespace) -> list[Case]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes = options.shape or ["opt-1.3b" if device.type == "cuda" else "minilm"]
    return [
        _case(shape, name, method, device, options)
        for shape in dict.fromkeys(shapes)
        for name, method in methods(options.anchor_every).items()
    ]


def _case(shape_name: str, method_name: str, method: Method, device: torch.device, options: Namespace) -> Case:
    shape = SHAPES[shape_name]
    usual = shape.batch if device.type == "cpu" else shape.gpu_batch
    batch = Batch(options.batch or usual.examples, options.tokens or usual.tokens)
    dtype = _DTYPES[options.dtype or ("bf16" if shape.large and device.type == "cuda" else "fp32")]
    threads = options.threads if device.type == "cpu" else None
    facts = {
        "backend": options.backend or _default_backend(device),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "shape": shape_name,
        "method": method_name.partition("/")[0],
        "perturb": method.perturb,
        "batch": batch.examples,
        "tokens": batch.tokens,
        "anchor_every": method.anchor_every or None,
    }

    def measure() -> list[Row]:
        torch.set_num_threads(options.threads)
        task = shape.build(batch, device, dtype)
        stated = (shape_name, method_name, device.type, threads, dtype) == _STATED_FOR
        trial, make = _trial(task, method, device, options, stated)
        more = {"elements": trial.elements, "active_share": method.active_share(task.model)}
        rows = compare(trial, Plan(options.rounds, options.seconds), device)
        more |= make.launches() if rows[0]["correct"] else {}
        return [more | row | _per_forwards(row) for row in rows]

    return Case(
        f"{shape_name}/{method_name}",
        facts,
        measure,
        unusable(device, options.backend),
        str(device),
        partial(_bytes_needed, shape, batch, dtype, method),
    )


def _per_forwards(row: Row) -> Row:
    """A step against its forwards alone; for MeZO-SVRG those at the anchor are among them."""
    return {
        f"{who}step_per_forwards": row[f"{who}seconds_median"] / row[f"{who}forwards_seconds_median"]
        for who in ("", "baseline_")
        if f"{who}forwards_seconds_median" in row  # a graph has no parts
    }


def _bytes_needed(shape: Shape, batch: Batch, dtype: torch.dtype, method: Method) -> int:
    """About what a case takes: the model and two copies for what it is compared with, their snapshots, the published
    pass's temporaries, the logits in the weights' type and twice in float32, and some activations.
    """
    parameters = shape.parameters()
    sizes = [p.numel() for p in parameters]
    widest = max(p.shape[0] for p in parameters)
    snapshots = 0 if not method.anchor_every else 2 if method.perturb == "in_place" else 3
    tokens = batch.examples * batch.tokens
    weights = dtype.itemsize * ((3 + snapshots) * sum(sizes) + 4 * max(sizes))
    return weights + tokens * widest * (dtype.itemsize + 8)


def _default_backend(device: torch.device) -> str:
    return f"native:{instruction_sets()[0]}" if device.type == "cpu" and instruction_sets() else "default"


def unusable(device: torch.device, backend: str | None) -> str | None:
    """Why steps cannot run on the device here, or None."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    if importlib.util.find_spec("transformers") is None:
        return NO_TRANSFORMERS
    try:
        backends.resolve(backend, device)
    except ValueError as error:
        return str(error)
    return None


class StepMaker:
    """Makes the calls of one case."""

    def __init__(self, task: Task, method: Method, device: torch.device, options: Namespace):
        self.task, self.method, self.device, self.options = task, method, device, options
        self.watch = Watch(device)
        self.first = self.ours(task.model)

    def _loss_of(self, model: nn.Module, watch: Watch | None = None) -> Callable[[], Tensor]:
        watch = watch or self.watch

        def loss() -> Tensor:
            with watch.part("forwards"):
                return self.task.loss(model)

        return loss

    def call(self, run: Callable[[], object], steps: int | None = None) -> Call:
        return Call(run, self.options.threads, self.watch, steps or self.method.steps)

    def ours(self, model: nn.Module, method: Method | None = None) -> Ours:
        return Ours(method or self.method, model, self._loss_of(model), self.watch, self.options.backend)

    def baseline(self, model: nn.Module, published: bool) -> Callable[[], None]:
        return baseline(self.method, model, self._loss_of(model), self.watch, self.first, published=published)

    def memory(self, *makers: Callable[[nn.Module], Callable[[], object]]) -> list[Row]:
        """For each of the makers the columns of a row against it."""
        every = [lambda model: self.ours(model).run, *makers]
        alone, ours, *others = peak_bytes(self.task.model, partial(_forwards, self.task), every, self.device)
        own = {"peak_memory_mib": ours / _MIB, "extra_memory_mib": (ours - alone) / _MIB}
        return [
            own | {"baseline_peak_memory_mib": b / _MIB, "baseline_extra_memory_mib": (b - alone) / _MIB}
            for b in others
        ]

    def graphed(self, model: nn.Module) -> Call:
        """Of the same steps as a CUDA graph."""
        run = graphed(self.method, model, lambda: self.task.loss(model), self.options.backend, self.device)
        return Call(run, self.options.threads)

    def launches(self) -> Row:
        """Of a step on a GPU, apart from the timed ones."""
        ranges = Ranges()
        loss = self._loss_of(self.task.model, ranges)
        return counted(lambda: self.first.run(loss, ranges), self.device, self.method.steps)


def _trial(
    task: Task, method: Method, device: torch.device, options: Namespace, stated: bool
) -> tuple[Trial, StepMaker]:
    make = StepMaker(task, method, device, options)
    versus = _against_in_place(make) if method.perturb == "in_forward" else _against_others(make, stated)
    elements = sum(p.numel() for p in task.model.parameters())
    return Trial(make.call(make.first.run), make.first.check, versus, elements), make


def _memory_target(make: StepMaker) -> Target:
    return Target("extra_memory_mib", at_most=make.method.extra_bytes(make.task.model) / _MIB + 1)


def _against_others(make: StepMaker, stated: bool) -> list[Versus]:
    """A step in place against the same step without zo_kernels."""
    model, method = make.task.model, make.method
    facts = make.memory(lambda own: make.baseline(own, True), lambda own: make.baseline(own, False))
    other = copy.deepcopy(model)  # the baselines' own, since they replace the memory of the weights
    published, eager = (make.call(make.baseline(other, published)) for published in (True, False))
    targets = [_memory_target(make)]
    if stated:
        targets += [Target("ratio", _AGAINST_PUBLISHED), Target("forwards_share", _FORWARDS_SHARE)]
    versus = [
        Versus("published passes", published, targets=targets, facts=facts[0]),
        Versus("eager passes", eager, facts=facts[1]),
    ]
    own = {name: value for name, value in facts[0].items() if not name.startswith("baseline_")}
    if make.options.graphed and make.device.type == "cuda" and not method.drop and not method.anchor_every:
        versus.append(Versus("as a graph", make.graphed(copy.deepcopy(model)), facts=own))
    if method.drop:
        mezo = make.call(make.ours(copy.deepcopy(model), MEZO).run, 1)
        bound = Target("ratio", 1 / (_OVER_PROPORTION * method.active_share(model)))
        versus.append(Versus("MeZO", mezo, "passes", [bound], own))
    return versus


def _against_in_place(make: StepMaker) -> list[Versus]:
    """A step in the forward against the same step in place, and against that without zo_kernels.

    Each has a model of its own: an optimizer whose weights another has changed takes fingerprints of all of them.
    """
    model, in_place = make.task.model, make.method.in_place
    facts = make.memory(lambda own: make.ours(own, in_place).run, lambda own: make.baseline(own, True))
    published = make.call(make.baseline(copy.deepcopy(model), True))
    targets = [_memory_target(make), Target("ratio", _IN_PLACE_AGAINST_IN_FORWARD)]
    return [
        Versus("in place", make.call(make.ours(copy.deepcopy(model), in_place).run), targets=targets, facts=facts[0]),
        Versus("published passes", published, facts=facts[1]),
    ]


@torch.no_grad()
def _forwards(task: Task, model: nn.Module) -> None:
    for _ in range(2):
        task.loss(model)


def cells(row: Row) -> dict[str, str]:
    parts = {part: f"{row[f'{part}_seconds_median'] * 1e3:,.1f}" for part in ("forwards", "passes", "other")}
    shown = {
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        **parts,
        "forwards' share": f"{row['forwards_share']:.1%}",
        "step/forwards": f"{row['step_per_forwards']:.3f}",
        "peak MiB": f"{row['peak_memory_mib']:,.0f}",
        "extra MiB": f"{row['extra_memory_mib']:.2f}",
    }
    if row["pass_launches_per_step"] is None:
        return shown
    waits = f"{row['synchronisations_per_step']:g} {row['synchronised_by']}".rstrip()
    return {**shown, "pass launches": f"{row['pass_launches_per_step']:g}", "waits": waits}
