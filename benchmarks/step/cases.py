"""`step`: whole steps of the optimizers on a model, against the same steps without zo_kernels."""

from __future__ import annotations

import copy
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from zo_kernels import backends
from zo_kernels.backends.native import instruction_sets
from zo_kernels.weights.blocks import find_blocks

from ..bench.compare import Trial, Versus, compare
from ..bench.memory import peak_bytes
from ..bench.registry import Case, Row, Target
from ..bench.timing import Call, Plan, Watch
from ..kernels.baselines import EagerPass, published_pass
from ..kernels.cases import DTYPES, facts_of
from .baseline_steps import Baseline
from .graphed import graphed
from .launches import Ranges, counted
from .methods import EPS, LR, MEZO, Method, Ours, methods
from .shapes import SHAPES, Batch, Shape, Task, device_of

# Targets of MeZO on a CPU with two threads: on MiniLM, and
_STATED_ON = ("cpu", 2, torch.float32)
_AGAINST_PUBLISHED = [Target("ratio", 2.5), Target("forwards_share", 0.85)]
# with signs, on a model whose step is half passes with normals, and on one whose step is nearly all forwards.
_OF_SIGNS = {
    ("opt-125m", Batch(1, 32)): [Target("ratio", 1.5)],
    ("minilm", Batch(32, 34)): [Target("passes_share", at_most=0.03)],
}
# Targets everywhere: LeZO's passes take time in proportion to the weights that take part, and a step in the forward at
# most a tenth more than one in place.
_OVER_PROPORTION = 1.1
_IN_PLACE_AGAINST_IN_FORWARD = 1 / 1.1
_MIB = 2**20
NO_TRANSFORMERS = "transformers is not installed"
PUBLISHED, NORMALS = "published passes", "normals"


def cases(options: Namespace) -> list[Case]:
    device = device_of(options)
    shapes = options.shape or ["opt-1.3b" if device.type == "cuda" else "minilm"]
    return [
        _case(shape, name, method, device, options)
        for shape in dict.fromkeys(shapes)
        for name, method in methods(options.anchor_every, options.directions, options.distribution).items()
    ]


def _case(shape_name: str, method_name: str, method: Method, device: torch.device, options: Namespace) -> Case:
    shape = SHAPES[shape_name]
    batch = shape.batch_of(options, device)
    dtype = DTYPES[options.dtype or ("bf16" if shape.large and device.type == "cuda" else "fp32")]
    threads = options.threads if device.type == "cpu" else None
    stated = _stated(shape_name, method_name, batch) if (device.type, threads, dtype) == _STATED_ON else {}
    facts = {"backend": options.backend or _default_backend(device), **facts_of(device, dtype, threads)}
    facts |= {"shape": shape_name, "method": method_name.partition("/")[0], "perturb": method.perturb}
    facts |= {"distribution": method.distribution}
    facts |= {"batch": batch.examples, "tokens": batch.tokens, "anchor_every": method.anchor_every or None}
    facts |= {"directions": method.directions, "forwards_per_step": method.forwards_per_step}

    def measure() -> list[Row]:
        torch.set_num_threads(options.threads)
        make = StepMaker(shape.build(batch, device, dtype), method, device, options)
        trial = make.trial(make.others(stated))
        rows = compare(trial, Plan(options.rounds, options.seconds), device)
        more = {"elements": trial.elements, "active_share": method.active_share(make.task.model)}
        more |= make.launches()
        return [more | row | _per_forwards(row) for row in rows]

    needed = partial(_bytes_needed, shape, batch, dtype, method)
    return Case(f"{shape_name}/{method_name}", facts, measure, unusable(device, options.backend), str(device), needed)


def _stated(shape: str, method: str, batch: Batch) -> dict[str, list[Target]]:
    """The targets of a row, by its baseline."""
    if method == "MeZO":
        return {PUBLISHED: _AGAINST_PUBLISHED} if shape == "minilm" else {}
    return {NORMALS: _OF_SIGNS.get((shape, batch), [])} if method == "MeZO/rademacher" else {}


def _per_forwards(row: Row) -> Row:
    """A step against its forwards alone; for MeZO-SVRG those at the anchor are among them."""
    return {
        f"{who}step_per_forwards": row[f"{who}seconds_median"] / row[f"{who}forwards_seconds_median"]
        for who in ("", "baseline_")
        if f"{who}forwards_seconds_median" in row  # a graph has no parts
    }


def _bytes_needed(shape: Shape, batch: Batch, dtype: torch.dtype, method: Method) -> int:
    """Estimate a case's memory: the model and a copy for each of two baselines, their snapshots, the published pass's
    temporaries, the logits in the weights' dtype and twice in float32, and some activations.
    """
    parameters = shape.parameters()
    sizes = [p.numel() for p in parameters]
    widest = max(p.shape[0] for p in parameters)
    snapshots = 0 if not method.anchor_every else 2 if method.perturb == "in_place" else 3
    weights = dtype.itemsize * ((3 + snapshots) * sum(sizes) + 4 * max(sizes))
    return weights + batch.examples * batch.tokens * widest * (dtype.itemsize + 8)


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

    def trial(self, versus: Iterator[Versus]) -> Trial:
        elements = sum(p.numel() for p in self.task.model.parameters())
        return Trial(self.call(self.first.run), self.first.check, list(versus), elements)

    def call(self, run: Callable[[], object], steps: int | None = None) -> Call:
        return Call(run, self.options.threads, self.watch, steps or self.method.steps)

    def ours(self, model: nn.Module, method: Method | None = None) -> Ours:
        return Ours(method or self.method, model, self._loss_of(model), self.watch, self.options.backend)

    def baseline(self, model: nn.Module, published: bool) -> Callable[[], None]:
        """The same steps by MeZO's published passes, or by the best eager ones; they replace the weights' memory.

        They draw normals, as MeZO's code does; those of FZOO, which is published with signs, draw what ours draws. The
        thresholds are those that `first` found: `model` is a copy of its model.
        """
        params, thresholds = list(model.parameters()), self.first.optimizer.state_dict()["zo"]["thresholds"]
        drawn = self.method.distribution if self.method.one_sided else "normal"
        apply = partial(published_pass, distribution=drawn) if published else EagerPass(params, drawn)
        steps = Baseline(params, apply, not published, self._loss_of(model), self.watch, EPS, LR, thresholds)
        if self.method.drop:
            steps.blocks = [list(block.parameters()) for block in find_blocks(model)]
            steps.dropped = self.method.dropped(model)
        if self.method.one_sided:
            return partial(steps.fzoo, self.method.directions)
        return partial(steps.svrg, self.method.steps) if self.method.anchor_every else steps.spsa

    def others(self, stated: Mapping[str, Sequence[Target]]) -> Iterator[Versus]:
        """Yield the baselines: the same step without zo_kernels; in place for one in the forward; normals for signs.

        `stated` has more targets of the rows of some of them.

        Each of ours has a model of its own: an optimizer whose weights another has changed takes fingerprints of all
        of them. So have the baselines, which replace the memory of the weights.
        """
        model, method = self.task.model, self.method
        memory = Target("extra_memory_mib", at_most=method.extra_bytes(model) / _MIB + 1)
        if method.distribution != "normal":
            normal = replace(method, distribution="normal")
            facts = self._memory(lambda own: self.ours(own, normal).run, lambda own: self.baseline(own, True))
            run = self.ours(copy.deepcopy(model), normal).run
            yield Versus(NORMALS, self.call(run), targets=[memory, *stated.get(NORMALS, [])], facts=facts[0])
            yield Versus(PUBLISHED, self.call(self.baseline(copy.deepcopy(model), True)), facts=facts[1])
            return
        if method.perturb == "in_forward":
            in_place = replace(method, perturb="in_place")
            facts = self._memory(lambda own: self.ours(own, in_place).run, lambda own: self.baseline(own, True))
            targets = [memory, Target("ratio", _IN_PLACE_AGAINST_IN_FORWARD)]
            run = self.ours(copy.deepcopy(model), in_place).run
            yield Versus("in place", self.call(run), targets=targets, facts=facts[0])
            yield Versus(PUBLISHED, self.call(self.baseline(copy.deepcopy(model), True)), facts=facts[1])
            return
        facts = self._memory(lambda own: self.baseline(own, True), lambda own: self.baseline(own, False))
        other = copy.deepcopy(model)
        published, eager = (self.call(self.baseline(other, published)) for published in (True, False))
        targets = [memory, *stated.get(PUBLISHED, [])]
        yield Versus(PUBLISHED, published, targets=targets, facts=facts[0])
        yield Versus("eager passes", eager, facts=facts[1])
        own = {name: value for name, value in facts[0].items() if not name.startswith("baseline_")}
        if self.options.graphed and self.device.type == "cuda" and not method.drop and not method.anchor_every:
            yield Versus("as a graph", self._graphed(copy.deepcopy(model)), facts=own)
        if method.drop:
            mezo = self.call(self.ours(copy.deepcopy(model), MEZO).run, 1)
            bound = Target("ratio", 1 / (_OVER_PROPORTION * method.active_share(model)))
            yield Versus("MeZO", mezo, "passes", [bound], own)

    def _memory(self, *makers: Callable[[nn.Module], Callable[[], object]]) -> list[Row]:
        """The memory columns of the row of each baseline, given what makes its step."""
        every = [lambda model: self.ours(model).run, *makers]
        alone, ours, *others = peak_bytes(self.task.model, self._forwards, every, self.device)
        own = {"peak_memory_mib": ours / _MIB, "extra_memory_mib": (ours - alone) / _MIB}
        return [
            own | {"baseline_peak_memory_mib": b / _MIB, "baseline_extra_memory_mib": (b - alone) / _MIB}
            for b in others
        ]

    @torch.no_grad()
    def _forwards(self, model: nn.Module) -> None:
        for _ in range(2):
            self.task.loss(model)

    def _graphed(self, model: nn.Module) -> Call:
        """The same steps as a CUDA graph."""
        run = graphed(self.method, model, lambda: self.task.loss(model), self.options.backend, self.device)
        return Call(run, self.options.threads)

    def launches(self) -> Row:
        """The columns of launches and waits, from a step apart from the timed ones."""
        ranges = Ranges()
        loss = self._loss_of(self.task.model, ranges)
        return counted(lambda: self.first.run(loss, ranges), self.device, self.method.steps)


def cells(row: Row) -> dict[str, str]:
    parts = {part: f"{row[f'{part}_seconds_median'] * 1e3:,.1f}" for part in ("forwards", "passes", "other")}
    shown = {
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        "forwards a step": f"{row['forwards_per_step']:g}",
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
