"""Perturbation in the forward: θ is never written, every module runs on the bits that the primitive would write."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import stored_masks_of
from models import Block, BlockMLP, block_mlp, real_loss
from outright import bits, holding, losses_outright, moved, trainable
from scripted import (
    ANCHOR_SLOT,
    EPS,
    METHODS,
    SEED,
    SEPARATE_SLOT,
    Weights,
    assert_same,
    block_names,
    clean_masks,
    is_exempt,
    same_bits,
    snapshot,
    take_step,
)
from shapes import SHAPES, WIDTH, InContainers, Parent, Peeks, Shape, Takes, autocast, inputs, squared, weight
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

import zo_kernels as zo
from zo_kernels.estimators.draws import blocks_to_drop, direction_seeds
from zo_kernels.perturbation.engine import Engine
from zo_kernels.perturbation.in_forward import InForwardProbes
from zo_kernels.perturbation.reads.seals import Seals
from zo_kernels.perturbation.reads.watch import Watch

# Of PyTorch, on what is in use here but none of our business.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = st.fixed_dictionaries(
    {
        "directions": st.integers(1, 2),
        "sparsity": st.sampled_from([0.0, 0.5, 0.75]),
        "drop": st.sampled_from([0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "rounding": st.sampled_from(["auto", "nearest"]),
    }
)
OUTPUTS = st.sampled_from([3, 50])  # with 50, the head is so large that a block is perturbed as one
quickly = partial(settings, deadline=None, database=None, derandomize=True)


def build(method: str, model: nn.Module, lr: float = 0.0, **options: Any) -> zo.ZeroOrderOptimizer:
    if method == "MeZOSVRG":
        options = {"anchor_lr": lr, "anchor_every": 2, **options}
    options = {"eps": EPS, "seed": SEED, "drop": 0.0, "perturb": "in_forward", **options}
    return METHODS[method](model, lr=lr, **options)


def nothing_left_behind() -> bool:
    hooks = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks_always_called,
        torch_module._global_forward_hooks_with_kwargs,
    )
    return not any(hooks)


class Early(Exception):
    """The closure has what it wants."""


class EarlyExit(BaseException):
    """As Early, but as little of an Exception as an interrupt is."""


# How a call of the closure ends; the third, whether that comes out of the step.
ENDS: dict[str, tuple[str, type[BaseException], bool]] = {
    "nan": ("at the end", ValueError, True),
    "raises": ("at the end", RuntimeError, True),
    "interrupted": ("at the end", KeyboardInterrupt, True),
    "raises in a module": ("in a module", StopIteration, True),
    "interrupted in a module": ("in a module", KeyboardInterrupt, True),
    "early": ("in a module", Early, False),
    "early exit": ("in a module", EarlyExit, False),
}


class Ending:
    """A closure, one call of which ends in some way. While no module runs it finds the parameters as they were."""

    def __init__(self, model: BlockMLP, how: str, call: int):
        self.model, self.how, self.call, self.calls = model, how, call, 0
        self.where, self.error, _ = ENDS[how]
        self.expected = self.state()
        model.blocks[1].down.register_forward_pre_hook(lambda *_: self.end("in a module"))

    def state(self) -> list[Any]:
        parameters = self.model.parameters()
        with torch._C.DisableTorchFunctionSubclass():  # unnoticed: it would be called again
            return [(id(p), p.data_ptr(), p.requires_grad, p.is_leaf, bits(p), p._version) for p in parameters]

    def end(self, where: str) -> None:
        if where == self.where and self.calls == self.call + 1 and self.how != "nan":
            raise self.error()

    def __call__(self) -> float:
        self.calls += 1
        assert self.state() == self.expected
        loss = math.nan if self.how == "nan" and self.calls == self.call + 1 else 1.0
        with suppress(Early, EarlyExit):
            loss *= real_loss(self.model, 0).item()
        if self.error is not EarlyExit:  # PyTorch runs no hooks then; a module's weights come back with the step's end
            assert self.state() == self.expected
        self.end("at the end")
        return loss


@quickly(max_examples=40)
@given(
    method=st.sampled_from(list(METHODS)),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    outputs=OUTPUTS,
    how=st.sampled_from(list(ENDS)),
    call=st.integers(0, 9),
)
def test_probes_leave_no_trace(method, dtype, options, outputs, how, call) -> None:
    """With updates of nothing no bit ever changes; without an update, not even a version counter does."""
    model = block_mlp(depth=2, dtype=dtype, outputs=outputs)
    opt = build(method, model, **options)
    closure, failed = Ending(model, how, call), 0
    for _ in range(3):
        try:
            take_step(opt, closure)
        except closure.error:
            assert closure.calls == call + 1
            assert closure.state() == closure.expected
            failed += 1
        assert nothing_left_behind()
        after = closure.state()
        assert [s[:-1] for s in after] == [s[:-1] for s in closure.expected]
        closure.expected = after  # an update is a pass over θ
    assert failed == (ENDS[how][2] and closure.calls > call)
    assert opt.refused_steps == (how == "nan" and failed)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the shell has it ignored, as in the background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupt_at_any_line_leaves_no_trace(interruptible: None) -> None:
    """Ctrl-C may come in between any two lines of the engine."""
    functions = [f for f in vars(Engine).values() if callable(f)]
    functions += [f for f in vars(Seals).values() if callable(f)]
    codes = {f.__code__ for f in [*functions, InForwardProbes.evaluate]}
    model = Parent(Takes(lambda w: w))
    opt = build("MeZO", model)
    before = [(p.data_ptr(), bits(p)) for p in model.parameters()]
    left = 0

    def tracer(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code not in codes:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return tracer

    for at in itertools.count(1):
        left, outer = at, sys.gettrace()
        sys.settrace(tracer)
        try:
            opt.step(lambda: squared(model))
            break  # the step has fewer lines than that
        except KeyboardInterrupt:
            assert [(p.data_ptr(), bits(p)) for p in model.parameters()] == before
            assert nothing_left_behind() and {type(p) for p in model.parameters()} == {nn.Parameter}
        finally:
            sys.settrace(outer)
    assert at > 100


class Recorder:
    """A closure on real data that keeps, for each call, the loss and what every module's own weights were."""

    def __init__(self, model: nn.Module):
        self.model, self.seen, self.losses = model, list[Weights](), list[float]()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self.look, name))

    def look(self, prefix: str, module: nn.Module, _: Any) -> None:
        own = module.named_parameters(prefix, recurse=False)
        self.seen[-1].update({name: p.detach().clone() for name, p in own})

    def __call__(self) -> Tensor:
        self.seen.append({})
        loss = real_loss(self.model, 0)
        self.losses.append(loss.item())
        return loss


def thresholds(opt: zo.ZeroOrderOptimizer, model: nn.Module) -> dict[str, float]:
    found = zip(trainable(model), opt.state_dict()["zo"]["thresholds"], strict=True)
    return {name: h for name, h in found if h is not None}


def dropped_names(model: BlockMLP, step: int, drop: float) -> set[str]:
    dropped = blocks_to_drop(SEED, step, len(model.blocks), drop)
    return set().union(*(names for i, names in enumerate(block_names(model)) if i in dropped))


@quickly(max_examples=40)
@given(
    method=st.sampled_from(list(METHODS)),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    outputs=OUTPUTS,
    shared=st.booleans(),
)
def test_modules_see_the_specified_bits(method, dtype, options, outputs, shared) -> None:
    """In every evaluation of four steps: weights perturbed outright, hence their loss; then the update of θ, if it is
    from θ.
    """
    model, twin = (block_mlp(depth=2, dtype=dtype, outputs=outputs) for _ in range(2))
    lr = 0.01
    svrg = method == "MeZOSVRG"
    opt = build(method, model, lr=lr, **options, **({"shared_direction": shared} if svrg else {}))
    rounding = "nearest" if options["rounding"] == "nearest" else "stochastic"
    recorder, limits, exempt = Recorder(model), thresholds(opt, model), is_exempt(model)
    n = options["directions"]

    def decay(name: str) -> float:
        return 1.0 if exempt(name) else 1 - lr * options["weight_decay"]

    for step in range(4):
        theta = snapshot(model)
        anchoring = svrg and step % 2 == 0
        if anchoring or not svrg:
            start, masks = theta, clean_masks(theta, limits)
            untouched = dropped_names(model, step, options["drop"])
        evaluations = [(theta, direction_seeds(SEED, step, n, ANCHOR_SLOT if anchoring else 0))]
        if svrg and not anchoring:
            evaluations.append((start, direction_seeds(SEED, step, n, 0 if shared else SEPARATE_SLOT)))
        expected = [
            moved(model, source, {seed: signed}, masks=masks, untouched=untouched, rounding=rounding)
            for source, seeds in evaluations
            for seed in seeds
            for signed in (EPS, -EPS)
        ]
        recorder.seen.clear()
        recorder.losses.clear()
        take_step(opt, recorder)
        assert len(recorder.seen) == len(expected)
        for got, loss, weights in zip(recorder.seen, recorder.losses, expected, strict=True):
            assert_same(weights, got)
            with holding(twin, weights), torch.no_grad():
                assert real_loss(twin, 0).item() == loss
        if anchoring or not svrg:
            update = {s: -lr * g / n for s, g in zip(evaluations[0][1], opt.projected_gradients, strict=True)}
            after = moved(model, theta, update, masks=masks, untouched=untouched, decay=decay, rounding=rounding)
            assert_same(after, snapshot(model))


@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO", "LeZO"])
def test_masks_are_taken_from_clean_weights_and_not_stored(method: str) -> None:
    """In place they are stored, and the same."""
    first = {}
    for perturb in ("in_place", "in_forward"):
        model = block_mlp()
        opt = build(method, model, lr=0.01, sparsity=0.6, perturb=perturb)
        assert len(stored_masks_of(opt)) == (perturb == "in_place") * len(trainable(model))
        recorder = Recorder(model)
        for _ in range(3):
            theta = snapshot(model)
            masks = clean_masks(theta, thresholds(opt, model))
            opt.step(recorder)
            for weights in (*recorder.seen[-2:], snapshot(model)):
                changed = {name: weights[name] != t for name, t in theta.items()}
                assert not any((changed[name] & ~masks[name]).any() for name in theta)
                assert sum(changed[name].sum() for name in theta) > 0.99 * sum(masks[name].sum() for name in theta)
        first[perturb] = recorder.seen[0]
    assert_same(first["in_place"], first["in_forward"])


def made(shape: Shape) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return shape.build()


@pytest.mark.parametrize("name", SHAPES)
def test_losses_are_those_of_weights_perturbed_outright(name: str) -> None:
    if "ModelOutput" in name:
        pytest.importorskip("transformers")
    shape = SHAPES[name]
    model, twin, losses = made(shape), made(shape), []

    def closure() -> Any:
        loss = shape.loss(model)
        losses.append(float(loss))
        return loss

    with shape.step_within(), torch.no_grad():
        clean = float(shape.loss(made(shape)))
    opt = build("MeZO", model, directions=2)
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    for step in range(3):
        losses.clear()
        with shape.step_within():
            opt.step(closure)
            expected = losses_outright(twin, lambda: shape.loss(twin), seed=SEED, step=step, eps=EPS, directions=2)
        once = [loss for loss, _ in groupby(losses)]  # twice, if something was drawn: see `randomness.Draws`
        assert once[shape.again * (step == 0) :] == expected
        assert len({clean, *expected}) == 5
        assert_same(before, snapshot(model))
        assert addresses == [p.data_ptr() for p in model.parameters()]
        assert nothing_left_behind()
        if not shape.again:
            assert all(map(torch.equal, model.buffers(), twin.buffers()))
    with shape.step_within(), torch.no_grad():
        assert float(shape.loss(model)) == clean


def test_hooks_run_and_see_perturbed_weights_before_a_module() -> None:
    """Forward hooks run, too, when the module is at θ again."""
    model, seen = block_mlp(depth=1), []
    up, name = model.blocks[0].up, "blocks.0.up.weight"
    up.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()))
    up.register_forward_hook(lambda m, args, output: seen.append(bits(m.weight)))
    build("MeZO", model).step(lambda: real_loss(model, 0))
    theta = snapshot(model)
    (seed,) = direction_seeds(SEED, 0, 1)
    for i, signed in enumerate((EPS, -EPS)):
        assert same_bits(seen[2 * i], moved(model, theta, {seed: signed})[name])
        assert seen[2 * i + 1] == bits(theta[name])


@pytest.mark.parametrize("in_inference", [False, True])
def test_models_made_in_inference_mode(in_inference: bool) -> None:
    """Their parameters are tensors of another kind."""
    with torch.inference_mode():
        model = block_mlp()
    losses = []

    def closure() -> Tensor:
        losses.append(real_loss(model, 0))
        return losses[-1]

    before = snapshot(model)
    with torch.inference_mode(in_inference):
        build("MeZO", model).step(closure)
    assert all(p.is_inference() for p in model.parameters())
    assert_same(before, snapshot(model))
    twin = block_mlp()
    assert losses == losses_outright(twin, lambda: real_loss(twin, 0), seed=SEED, step=0, eps=EPS)


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_around_steps_is_as_within_the_closure(method: str, perturb: str) -> None:
    """What autocast has cast and kept is used for no other weights."""
    results = []
    for around, inside in ((autocast, nullcontext), (nullcontext, autocast)):
        model, losses = block_mlp(), []
        opt = build(method, model, lr=0.01, perturb=perturb)

        def closure(model: nn.Module = model, inside: Any = inside, losses: list[float] = losses) -> Tensor:
            with inside():
                loss = real_loss(model, 0)
            losses.append(loss.item())
            return loss

        with around():
            for _ in range(4):
                take_step(opt, closure)
            closure()
        assert len(set(losses)) == len(losses)
        results.append(losses)
    assert results[0] == results[1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_bit_for_bit(method: str, dtype: torch.dtype, how: str) -> None:
    """Steps of a copy find weights that are read elsewhere by themselves."""
    torch.manual_seed(0)
    model = Peeks(depth=1).to(dtype)
    opt = build(method, model, lr=0.01, sparsity=0.5, directions=2)

    def go_on(opt: zo.ZeroOrderOptimizer, model: nn.Module, steps: range) -> list[float]:
        return [take_step(opt, lambda i=i: real_loss(model, i), lambda: real_loss(model, 100)).item() for i in steps]

    go_on(opt, model, range(3))
    pair = (opt, model)
    other_opt, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = snapshot(model)
    ahead = go_on(other_opt, other, range(3, 6))
    assert_same(before, snapshot(model))
    assert go_on(opt, model, range(3, 6)) == ahead
    assert_same(snapshot(model), snapshot(other))
    assert nothing_left_behind()


# Of a weight w and another tensor x of its shape.
READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda w, x: x + w,
    "out": lambda w, x: torch.add(x, 1, out=w),
    "in place": lambda w, x: w.zero_(),
    "copy": lambda w, x: x.copy_(w[0]),
    "cast": lambda w, x: w.double(),
    "clone": lambda w, x: w.t().reshape(-1),
    "number": lambda w, x: w[1, 1].item(),
    "list": lambda w, x: torch.cat([x, w]),
    "keyword": lambda w, x: functional.linear(x, weight=w),
    "dropout": lambda w, x: torch.dropout(w, 0.5, True),
}
NO_READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "views": lambda w, x: (w.t()[0], w.view(-1), w.reshape(-1), w.flatten(), w.unbind(), w.chunk(2), w.mT, w.detach()),
    "casts to the same": lambda w, x: (w.to(w.dtype), w.float(), w.contiguous(), w.to(w.device), w.type_as(x)),
    "like": lambda w, x: (torch.zeros_like(w), torch.empty_like(w), torch.randn_like(w), w.new_ones(3)),
    "as": lambda w, x: (x.expand_as(w), x.view_as(w), x.reshape_as(w), x.double().type_as(w), x.to(w)),
    "type": lambda w, x: (torch.result_type(x, w), torch.is_same_size(x, w), w.is_floating_point()),
    "dropout of nothing": lambda w, x: torch.dropout(w, 0.5, False),
    "others": lambda w, x: x + 1,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", [*READS, *NO_READS])
def test_what_reads_a_weight(case: str, mode: Any) -> None:
    """In inference mode operations are seen whole that otherwise are taken apart."""
    w, x, found, written = nn.Parameter(torch.ones(3, 3)), torch.ones(3, 3), set(), set()
    with mode(), Watch([torch.ones(2), w.detach()], lambda address: False, found.add, written.add):
        {**READS, **NO_READS}[case](w, x)
    assert found == ({1} if case in READS else set())
    assert written == ({1} if case in ("in place", "out") else set())


class Stale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = weight(WIDTH, WIDTH)
        self.view = self.own.detach()[1:]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.own + (x @ self.view.t()).sum()


class Keeps(nn.Module):
    """A parent reads what its child has kept of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)
        self.child.register_forward_pre_hook(self.keep)

    def keep(self, child: nn.Module, _: Any) -> None:
        self.kept = child.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) @ self.kept


def penalized(model: nn.Module) -> Tensor:
    return squared(model) + sum(p.square().sum() for p in model.parameters())


def by_gradient(model: nn.Module) -> Tensor:
    """Of the gradient along the input, in a backward pass."""
    with torch.enable_grad():
        x = inputs().requires_grad_()
        return torch.autograd.grad(squared_of(model(x)), x)[0].square().sum()


def squared_of(t: Tensor) -> Tensor:
    return t.square().mean()


def by_transform(model: nn.Module) -> Tensor:
    return torch.func.grad(lambda x: squared_of(model(x)))(inputs()).sum()


def through_a_new_module(model: nn.Module) -> Tensor:
    made = nn.Linear(WIDTH, WIDTH)
    made.weight = model[0].weight
    return squared(made)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


UNREACHABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str]] = {
    "penalty": (layers, penalized, r"reads 0\.weight, 0\.bias, 2\.weight, 2\.bias where no module runs"),
    "one weight": (layers, lambda m: squared(m) * m[2].bias.max(), r"reads 2\.bias where no module runs"),
    "its number": (layers, lambda m: squared(m).item() + m[2].bias[0].item(), r"reads 2\.bias where no module runs"),
    "forward itself": (InContainers, lambda m: squared_of(m.forward(inputs())), r"reads listed\.0, .* where no module"),
    "stale view": (Stale, squared, r"a module reads own through a view that was made before its forward"),
    "kept view": (Keeps, squared, r"after the forward of their module"),
    "backward": (layers, by_gradient, r"after the forward of their module"),
    "torch.func.grad": (layers, by_transform, r"after the forward of their module"),
    "new module": (layers, through_a_new_module, r"created anew in every call reads 0\.weight"),
    "nothing ran": (layers, lambda m: 1.0, r"none of the modules with trainable parameters ran"),
    "another model ran": (layers, lambda m: squared(layers()), r"none of the modules with trainable parameters ran"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_what_cannot_be_reached_is_an_error(case: str) -> None:
    """θ is untouched, the step does not count, and a mended closure goes on as if nothing had been."""
    make, loss, message = UNREACHABLE[case]
    torch.manual_seed(0)
    model = make()
    opt, before = build("MeZO", model), snapshot(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"closure: .*{message}.*perturb='in_place'"):
            opt.step(lambda: loss(model))
        assert_same(before, snapshot(model))
        assert nothing_left_behind()
    assert opt.step_count == opt.refused_steps == 0
    if case in ("stale view", "kept view"):
        return  # it is the model that would have to be mended
    losses = []
    opt.step(lambda: losses.append(squared(model)) or losses[-1])
    assert losses[-2:] == losses_outright(model, lambda: squared(model), seed=SEED, step=0, eps=EPS)


def compiled() -> nn.Module:
    return torch.compile(block_mlp())  # nothing is compiled before it runs


def compiled_itself() -> nn.Module:
    model = block_mlp()
    model.compile()
    return model


def compiled_in_part() -> nn.Module:
    model = block_mlp()
    model.blocks[1].up = torch.compile(model.blocks[1].up)
    return model


IMPOSSIBLE = {
    "parameters": (lambda: block_mlp().parameters(), r"it needs the module"),
    "named parameters": (lambda: block_mlp().named_parameters(), r"it needs the module"),
    "groups": (lambda: [{"params": list(block_mlp().parameters())}], r"it needs the module"),
    "compiled": (compiled, r"OptimizedModule is compiled by torch\.compile"),
    "compiled itself": (compiled_itself, r"BlockMLP is compiled by torch\.compile"),
    "compiled in part": (compiled_in_part, r"blocks\.1\.up is compiled by torch\.compile"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_where_it_cannot_be(case: str) -> None:
    make, reason = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=rf"perturb: 'in_forward' cannot be: {reason}"):
        build("MeZO", make())


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_another_module_are_refused(method: str, copied: bool) -> None:
    model, extra = block_mlp(depth=1), nn.Linear(3, 3)
    opt = build(method, model)
    if copied:
        opt, model = copy.deepcopy((opt, model))
    before = snapshot(extra)
    with pytest.raises(
        ValueError, match=r"param_groups\[1\]: params: expected parameters of the module.*extra\.weight"
    ):
        opt.add_param_group({"params": [("extra.weight", extra.weight)]})
    assert len(opt.param_groups) == 1
    take_step(opt, lambda: real_loss(model, 0))
    assert_same(before, snapshot(extra))


def test_parameters_that_the_module_has_got_since_take_part() -> None:
    model, losses = block_mlp(depth=1), []
    opt = build("MeZO", model)
    opt.step(lambda: real_loss(model, 0))
    model.blocks.append(Block(6))
    opt.add_param_group({"params": [(f"blocks.1.{n}", p) for n, p in model.blocks[1].named_parameters()]})
    opt.step(lambda: losses.append(real_loss(model, 0)) or losses[-1])
    assert losses == losses_outright(model, lambda: real_loss(model, 0), seed=SEED, step=1, eps=EPS)
