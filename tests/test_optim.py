"""The optimizers against the published methods, written here plainly in float64 on the noise of the specification.

Most tests drive a step with scripted losses: then the gradient estimates are known exactly, and what is compared is
where the weights are at each call of the closure and at the end.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, BlockMLP, Experts, Holder, block_mlp, family_loss
from tolerances import SHARED_DIRECTION_FACTOR, SIGMAS, loss_slope, step_in_place
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import backends, names
from zo_kernels.backends.types import Entry, Pass
from zo_kernels.ops import Table
from zo_kernels.optim import thresholds
from zo_kernels.optim.blocks import block_of_parameters, dropped_blocks, find_blocks
from zo_kernels.optim.thresholds import magnitude_threshold
from zo_kernels.spec import box_muller, direction_seed, philox4x32

LR, EPS, SEED = 0.1, 0.02, 11
METHODS = {"MeZO": zo.MeZO, "SparseMeZO": zo.SparseMeZO, "LeZO": zo.LeZO, "MeZOSVRG": zo.MeZOSVRG}
# What a run's seeds mean (docs/noise.md, 6): a change of these would break the replay of logs.
ANCHOR_SLOT, SEPARATE_SLOT = 2**17, 2**18

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few dozen elements are not worth waking threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def snapshot(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(integer), b.detach().view(integer))


def assert_same(a: Weights, b: Weights, only: Any = None) -> None:
    for name in a if only is None else only:
        assert same_bits(a[name], b[name]), name


def script(i: int) -> float:
    """The i-th scripted loss: no two alike, no pattern, differences near 2 EPS so that g is near 1."""
    return 1.0 + EPS * math.cos(1.0 + 2.3 * i + 0.1 * i * i)


class Script:
    """A closure that returns scripted losses and keeps the weights it saw."""

    def __init__(self, model: nn.Module, first: int = 0):
        self.model, self.first = model, first
        self.seen: list[Weights] = []
        self.losses: list[float] = []

    def __call__(self) -> Tensor:
        self.seen.append(snapshot(self.model))
        self.losses.append(script(self.first + len(self.losses)))
        return torch.tensor(self.losses[-1], dtype=torch.float64)

    def gradients(self, first: int = 0, n: int | None = None, eps: float = EPS) -> list[float]:
        pairs = zip(self.losses[first::2], self.losses[first + 1 :: 2], strict=True)
        return [(a - b) / (2 * eps) for a, b in pairs][:n]


def take_step(opt: zo.ZeroOrderOptimizer, closure: Any, full: Any = None) -> Any:
    return opt.step(closure, full or closure) if isinstance(opt, zo.MeZOSVRG) else opt.step(closure)


def run(opt: zo.ZeroOrderOptimizer, model: nn.Module, steps: int, first: int = 0) -> list[Script]:
    """Steps with scripted losses; every step has its own."""
    scripts = [Script(model, 100 * (first + i)) for i in range(steps)]
    for s in scripts:
        take_step(opt, s)
    return scripts


class Noise:
    """z of every parameter by name, in float64: noise v1 with each element's own parameter id."""

    def __init__(self, every: Weights):
        self.shapes = {name: t.shape for name, t in every.items()}
        ids = names.param_ids(every)
        sizes = [t.numel() for t in every.values()]
        self.index = torch.cat([torch.arange(n) for n in sizes])
        self.ids = torch.cat([torch.full((n,), ids[name]) for n, name in zip(sizes, every, strict=True)])
        self.sizes = sizes
        self.known: dict[int, Weights] = {}

    def __call__(self, seed: int) -> Weights:
        if seed not in self.known:
            c = self.index >> 2
            key = (seed & 0xFFFFFFFF, seed >> 32)
            x = philox4x32((c & 0xFFFFFFFF, c >> 32, self.ids, torch.zeros_like(c)), key)
            z = torch.stack([*box_muller(x[0], x[1]), *box_muller(x[2], x[3])])
            z = z.gather(0, (self.index & 3)[None])[0].double().split(self.sizes)
            self.known[seed] = {n: t.view(s) for (n, s), t in zip(self.shapes.items(), z, strict=True)}
        return self.known[seed]


class Reference:
    """What a step should do, for weights given in float64."""

    def __init__(self, weights: Weights, *, exempt: Callable[[str], bool] = lambda name: False):
        self.z, self.exempt = Noise(weights), exempt

    def move(
        self, w: Weights, along: dict[int, float], masks: Weights, untouched: Any = (), decay: float = 1.0
    ) -> Weights:
        """decay * w + m . sum along[seed] * z(seed); masked-out and untouched weights as they are."""
        out = {}
        for name, t in w.items():
            new = (1.0 if self.exempt(name) else decay) * t.double()
            for seed, scale in along.items():
                new = new + scale * self.z(seed)[name]
            keep = torch.ones_like(t, dtype=torch.bool) if name in untouched else ~masks[name]
            out[name] = torch.where(keep, t.double(), new)
        return out


def assert_close(got: Weights, expected: Weights, tolerance: float) -> None:
    for name, t in expected.items():
        away = (got[name].double() - t).abs().max().item()
        assert away <= tolerance, f"{name}: {away:.3g} away, at most {tolerance:.3g}"


def magnitude(*weights: Weights) -> float:
    return max(t.abs().max().item() for w in weights for t in w.values())


def clean_masks(w: Weights, thresholds: dict[str, float]) -> Weights:
    return {name: t.abs() <= thresholds.get(name, math.inf) for name, t in w.items()}


def percentile(t: Tensor, sparsity: float) -> float:
    """The threshold by sorting."""
    n = t.numel()
    return t.abs().float().flatten().sort().values[n - math.floor(sparsity * n) - 1].item()


def block_names(model: BlockMLP) -> list[set[str]]:
    return [{f"blocks.{i}.{n}" for n, _ in block.named_parameters()} for i, block in enumerate(model.blocks)]


def untouched_blocks(model: BlockMLP, before: Weights, during: Weights, masks: Weights) -> set[int]:
    """The blocks that a probe left as they were, which must be as a whole. A mask may leave out a tensor by itself."""
    found = set()
    for i, block in enumerate(block_names(model)):
        members = {n for n in block if masks[n].any()}
        kept = {n for n in members if same_bits(before[n], during[n])}
        assert kept in (set(), members), f"part of block {i} was left out: {kept}"
        if kept:
            found.add(i)
    return found


def is_exempt(model: nn.Module) -> Callable[[str], bool]:
    norms = {f"{m}.{n}" for m, x in model.named_modules() if isinstance(x, nn.LayerNorm) for n in ("weight", "bias")}
    dims = {name: p.dim() for name, p in model.named_parameters()}
    return lambda name: name in norms or dims[name] < 2


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of the tensors that each pass was given."""
    seen: list[set[str]] = []
    apply = Table.apply

    def counting(self: Table, do: Pass) -> None:
        indices = range(len(self.names)) if do.active is None else do.active
        seen.append({self.names[i] for i in indices})
        apply(self, do)

    monkeypatch.setattr(Table, "apply", counting)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# A step is the published step.

STEPS: dict[str, tuple[type, dict[str, Any]]] = {
    "MeZO": (zo.MeZO, {}),
    "MeZO, 3 directions": (zo.MeZO, {"directions": 3}),
    "MeZO, weight decay": (zo.MeZO, {"weight_decay": 0.5}),
    "SparseMeZO": (zo.SparseMeZO, {"sparsity": 0.6}),
    "LeZO": (zo.LeZO, {"drop": 0.5}),
    "Sparse-LeZO, 3 directions, weight decay": (
        zo.LeZO,
        {"drop": 0.75, "sparsity": 0.3, "directions": 3, "weight_decay": 0.5},
    ),
}


@pytest.mark.parametrize("spec", STEPS)
def test_step_is_the_published_one(spec: str, passes: list[set[str]]) -> None:
    cls, options = STEPS[spec]
    n, decay = options.get("directions", 1), 1 - LR * options.get("weight_decay", 0.0)
    model = block_mlp()
    model.plane = nn.LayerNorm((2, 3))  # weights of two dimensions that must not be decayed all the same
    nn.init.normal_(model.plane.weight)
    opt = cls(model, lr=LR, eps=EPS, seed=SEED, **options)
    start = snapshot(model)
    reference = Reference(start, exempt=is_exempt(model))
    h = {name: percentile(t, options["sparsity"]) for name, t in start.items()} if "sparsity" in options else {}
    drops = set()

    for step in range(4):
        before = snapshot(model)
        masks = clean_masks(before, h)
        passes.clear()
        (closure,) = run(opt, model, 1, first=step)
        after = snapshot(model)

        dropped = untouched_blocks(model, before, closure.seen[0], masks)
        assert len(dropped) == round(options.get("drop", 0.0) * len(model.blocks))
        drops.add(frozenset(dropped))
        untouched = set().union(*(block_names(model)[i] for i in dropped))
        assert passes == [set(before) - untouched] * (2 * n + 1)

        seeds = [direction_seed(SEED, step, k) for k in range(n)]
        gradients = closure.gradients()
        updates = [-LR * g / n for g in gradients]
        tolerance = step_in_place(magnitude(before, after), EPS, updates)
        probes = [(seed, signed) for seed in seeds for signed in (EPS, -EPS)]
        for seen, (seed, signed) in zip(closure.seen, probes, strict=True):
            assert_close(seen, reference.move(before, {seed: signed}, masks, untouched), tolerance)
        assert opt.projected_gradients == gradients
        expected = reference.move(before, dict(zip(seeds, updates, strict=True)), masks, untouched, decay)
        assert_close(after, expected, tolerance)

        for w in (*closure.seen, after):  # law 2, to the bit
            for name, t in w.items():
                keep = torch.ones_like(masks[name]) if name in untouched else ~masks[name]
                assert same_bits(t[keep], before[name][keep]), name
    assert len(drops) > 1 or "drop" not in options


def test_decay_all_takes_in_biases_and_norms() -> None:
    changes = {}
    for decay_all in (False, True):
        model = block_mlp()
        before = snapshot(model)
        group = {"params": list(model.named_parameters()), "decay_all": decay_all}
        opt = zo.MeZO([group], lr=LR, weight_decay=0.5)
        opt.step(lambda: 1.0)  # g = 0: only decay is left
        ratios = {n: (p / before[n]).mean().item() for n, p in model.named_parameters()}
        changes[decay_all] = {n: round(r, 3) for n, r in ratios.items()}
    small = {n for n, p in block_mlp().named_parameters() if p.dim() < 2}
    assert changes[False] == {n: 1.0 if n in small else 0.95 for n in before}
    assert changes[True] == dict.fromkeys(before, 0.95)


def test_mask_is_that_of_clean_weights() -> None:
    """A mask taken from perturbed weights would be another one here: many weights sit within ε of the threshold."""
    h = 0.5
    start = torch.linspace(h - 3 * EPS, h + 3 * EPS, 4001)
    model = Holder(w=start)
    opt = zo.SparseMeZO(model, lr=LR, eps=EPS, seed=SEED, sparsity=0.5)
    threshold = percentile(start, 0.5)
    clean = start <= threshold
    (closure,) = run(opt, model, 1)

    for seen in closure.seen:
        strayed = (seen["w"].abs() <= threshold) != clean
        assert strayed.sum() > 100
        assert same_bits(seen["w"][~clean], start[~clean])
        assert (seen["w"] != start)[clean].all()
    assert same_bits(model.w[~clean], start[~clean])
    expected = Reference({"w": start}).move(
        {"w": start}, {direction_seed(SEED, 0, 0): -LR * closure.gradients()[0]}, {"w": clean}
    )
    assert_close(snapshot(model), expected, step_in_place(1.0, EPS, [LR]))
    # And it is taken anew in each step, from the weights of then.
    before, clean = model.w.detach().clone(), model.w.detach().abs() <= threshold
    run(opt, model, 1, first=1)
    assert torch.equal(model.w != before, clean)


def test_thresholds_are_fixed_when_the_optimizer_is_made() -> None:
    model = Holder(w=torch.linspace(0.1, 1.0, 100))
    opt = zo.SparseMeZO(model, lr=0.0, sparsity=0.5)
    with torch.no_grad():
        model.w.mul_(10)  # all but the first few are beyond the old threshold now
    model.w.data = model.w.data.clone()  # the tables must be built again, the threshold must not
    before = model.w.detach().clone()
    (closure,) = run(opt, model, 1)
    assert torch.equal(closure.seen[0]["w"] != before, before <= percentile(torch.linspace(0.1, 1.0, 100), 0.5))


# Law 6. Masks and anchors keep it, in the subspace they leave.
UNBIASED = {
    "MeZO": (zo.MeZO, {}),
    "SparseMeZO": (zo.SparseMeZO, {"sparsity": 0.5}),
    "MeZOSVRG at an anchor": (zo.MeZOSVRG, {"anchor_lr": 1.0}),
}


@pytest.mark.parametrize("spec", UNBIASED)
def test_spsa_is_unbiased(spec: str) -> None:
    cls, options = UNBIASED[spec]
    n, d = 4096, 8
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(d, d, generator=generator, dtype=torch.float64)
    a, b = a @ a.T + torch.eye(d), torch.randn(d, generator=generator, dtype=torch.float64)
    model = Holder(w=torch.randn(d, generator=generator))
    start = model.w.detach().clone()

    def loss() -> float:
        w = model.w.double()
        return (0.5 * w @ a @ w + b @ w).item()

    # Central differences are exact on a quadratic, so ε may be large and rounding does not matter.
    opt = cls(model, lr=1.0, eps=0.5, seed=SEED, directions=n, **options)
    take_step(opt, loss)
    gradient = a @ start.double() + b
    if "sparsity" in options:
        gradient = gradient * (start.abs() <= percentile(start, options["sparsity"]))
    estimate = start.double() - model.w.detach().double()
    # z z' g has covariance |g|^2 I + g g'.
    error = torch.sqrt((gradient.norm() ** 2 + gradient**2) / n) * (gradient != 0)
    assert ((estimate - gradient).abs() <= SIGMAS * error).all()
    along = (estimate @ gradient) / gradient.norm() ** 2
    assert abs(along - 1) < SIGMAS * math.sqrt(2 / n)


def test_estimate_is_the_directional_derivative() -> None:
    """On a linear loss g is c . z, up to the rounding of the weights the model is given."""
    model = block_mlp()
    start = snapshot(model)
    c = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).double() for n, p in start.items()}

    def loss() -> float:
        return sum((c[n] * p.double()).sum().item() for n, p in model.named_parameters())

    opt = zo.MeZO(model, lr=1e-3, eps=EPS, seed=SEED, directions=2)
    opt.step(loss)
    z = Noise(start)
    weight_error = step_in_place(magnitude(start), EPS, [1e-3] * 2)
    loss_error = weight_error * sum(t.abs().sum().item() for t in c.values())
    for k, g in enumerate(opt.projected_gradients):
        expected = sum((c[n] * z(direction_seed(SEED, 0, k))[n]).sum().item() for n in c)
        assert abs(g - expected) <= loss_slope(loss_error, EPS)


def test_groups_have_their_own_rates_sparsity_and_decay() -> None:
    model = Holder(a=torch.randn(5, 7), b=torch.randn(4, 4), c=torch.randn(6, 3))
    options = {
        "a": {"lr": 0.1},
        "b": {"lr": 0.3, "weight_decay": 0.5},
        "c": {"lr": 0.05, "sparsity": 0.5, "weight_decay": 0.2},
    }
    groups = [{"params": [(n, p)], **options[n]} for n, p in model.named_parameters()]
    opt = zo.MeZO(groups, lr=1.0, eps=EPS, seed=SEED)
    before = snapshot(model)
    masks = clean_masks(before, {"c": percentile(before["c"], 0.5)})
    opt.param_groups[1]["lr"] = 0.2  # as a scheduler does
    options["b"]["lr"] = 0.2
    (closure,) = run(opt, model, 1)
    (g,) = closure.gradients()
    for name, o in options.items():
        rest = set(before) - {name}
        along = {direction_seed(SEED, 0, 0): -o["lr"] * g}
        expected = Reference(before).move(before, along, masks, rest, 1 - o["lr"] * o.get("weight_decay", 0.0))
        assert_close({name: model.get_parameter(name)}, {name: expected[name]}, step_in_place(6.0, EPS, [0.2 * g]))


# ---------------------------------------------------------------------------------------------------------------------
# Noise goes by name.


class Wrapper(nn.Module):
    """What torch.compile, FSDP and data parallelism do to names."""

    def __init__(self, model: nn.Module, under: str):
        super().__init__()
        self.add_module(under, model)


def reordered(model: BlockMLP) -> nn.Module:
    other = nn.Module()
    for name in ("head", "norm", "blocks", "embed"):
        other.add_module(name, getattr(model, name))
    return other


def grown(model: BlockMLP) -> nn.Module:
    model.aaa, model.extra = nn.Linear(3, 3), nn.Linear(3, 2)
    return model


def frozen(model: BlockMLP) -> nn.Module:
    model.blocks[1].up.weight.requires_grad_(False)
    model.embed.requires_grad_(False)
    return model


def in_groups(model: BlockMLP) -> list[dict[str, Any]]:
    named = list(model.named_parameters())[::-1]
    return [{"params": named[:5]}, {"params": named[5:], "lr": LR}]


VARIANTS: dict[str, Callable[[BlockMLP], Any]] = {
    "frozen": frozen,
    "reordered": reordered,
    "with more parameters": grown,
    "compiled": lambda m: Wrapper(m, "_orig_mod"),
    "data parallel": lambda m: Wrapper(m, "module"),
    "compiled and data parallel": lambda m: Wrapper(Wrapper(m, "_orig_mod"), "module"),
    "sharded and checkpointed": lambda m: Wrapper(Wrapper(m, "_checkpoint_wrapped_module"), "_fsdp_wrapped_module"),
    "as named parameters": lambda m: m.named_parameters(),
    "as groups, backwards": in_groups,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_goes_by_name(variant: str) -> None:
    plain, varied = block_mlp(), block_mlp()
    given = VARIANTS[variant](varied)
    for model, params in ((plain, plain), (varied, given)):
        run(zo.MeZO(params, lr=LR, eps=EPS, seed=SEED), model, 3)
    trained = {n for n, p in varied.named_parameters() if p.requires_grad}
    assert_same(snapshot(plain), snapshot(varied), trained & set(snapshot(plain)))
    start = snapshot(block_mlp())
    assert_same(start, snapshot(varied), set(start) - trained)
    assert not any(torch.equal(start[n], varied.get_parameter(n)) for n in trained & set(start))


def test_equal_tensors_get_unequal_noise() -> None:
    model = Holder(a=torch.zeros(64), b=torch.zeros(64))
    run(zo.MeZO(model, lr=LR), model, 1)
    assert (model.a != model.b).all()


def test_groups_of_equal_names_get_unequal_noise() -> None:
    """Two models in one optimizer have the same names in different groups."""
    first, second = Holder(w=torch.zeros(64)), Holder(w=torch.zeros(64))
    groups = [{"params": list(first.named_parameters())}, {"params": list(second.named_parameters())}]
    opt = zo.MeZO(groups, lr=LR)
    opt.step(Script(first))
    assert (first.w != second.w).all()


def test_unnamed_parameters_go_by_position() -> None:
    values = [torch.randn(5), torch.randn(3, 4)]
    results = []
    for names_ in (None, ("0", "1")):
        params = [nn.Parameter(v.clone()) for v in values]
        given = params if names_ is None else list(zip(names_, params, strict=True))
        opt = zo.MeZO(given, lr=LR, seed=SEED)
        for i in range(3):
            opt.step(iter([script(2 * i), script(2 * i + 1)]).__next__)
        results.append({str(i): p for i, p in enumerate(params)})
    assert_same(*results)


def tied(first: str, second: str) -> nn.Module:
    model = nn.Module()
    for name in (first, second):
        model.add_module(name, nn.Linear(4, 4, bias=False))
    torch.manual_seed(0)
    model.get_submodule(second).weight = model.get_submodule(first).weight = nn.Parameter(torch.randn(4, 4))
    return model


def test_tied_weights_get_one_noise() -> None:
    results = []
    for order in (("embed", "head"), ("head", "embed")):
        model = tied(*order)
        before = model.embed.weight.detach().clone()
        (closure,) = run(zo.MeZO(model, lr=LR, eps=EPS, seed=SEED), model, 1)
        assert model.embed.weight is model.head.weight
        results.append({"w": model.embed.weight.detach()})
        # The smaller name decides, wherever it stands.
        z = Noise({"embed.weight": before})(direction_seed(SEED, 0, 0))["embed.weight"]
        expected = {"w": before.double() - LR * closure.gradients()[0] * z}
        assert_close(results[-1], expected, step_in_place(magnitude(results[-1]) + 1, EPS, [LR]))
    assert_same(*results)


# Found by trying "w0", "w1", ...: their BLAKE2s digests begin with the same four bytes.
COLLIDING = ("w109164", "w43091")


@pytest.mark.parametrize("order", [COLLIDING, COLLIDING[::-1]])
def test_colliding_names_get_ids_that_do_not_depend_on_order(order: tuple[str, str]) -> None:
    alone = [names.param_ids([n])[n] for n in COLLIDING]
    assert alone == [509178630, 509178630]
    ids = names.param_ids(["w0", *order, "w1"])
    assert len(set(ids.values())) == 4
    assert ids[COLLIDING[0]] == alone[0]  # the first in code-point order keeps its own
    assert ids[COLLIDING[1]] == names.param_ids([f"{COLLIDING[1]}#1"])[f"{COLLIDING[1]}#1"]

    model = Holder(**{n: torch.zeros(32) for n in order})
    run(zo.MeZO(model, lr=LR, seed=SEED), model, 1)
    z = Noise({n: torch.zeros(32) for n in COLLIDING})(direction_seed(SEED, 0, 0))
    for n, direction in z.items():
        w = model.get_parameter(n).detach().double()
        assert torch.corrcoef(torch.stack([w, direction]))[0, 1].abs() > 0.999


def test_a_frozen_namesake_keeps_its_id() -> None:
    """Freezing one of a colliding pair must not give its id to the other."""
    results = []
    for freeze in (False, True):
        model = Holder(**{n: torch.zeros(32) for n in COLLIDING})
        model.get_parameter(COLLIDING[0]).requires_grad_(not freeze)
        run(zo.MeZO(model, lr=LR, seed=SEED), model, 2)
        results.append(snapshot(model))
    assert_same(*results, only=[COLLIDING[1]])
    assert not results[1][COLLIDING[0]].any()


# ---------------------------------------------------------------------------------------------------------------------
# Freezing, moving and adding parameters in the middle of a run.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5}], ids=["dense", "sparse"])
def test_freezing_in_the_middle_of_a_run(method: str, options: dict[str, Any]) -> None:
    """A frozen parameter keeps its bits; it takes part again, from where it is, when it is unfrozen."""
    model = block_mlp()
    opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED, **options)
    p, name = model.head.weight, "head.weight"
    run(opt, model, 2)
    p.requires_grad_(False)
    frozen_at = p.detach().clone()
    for s in run(opt, model, 2, first=2):
        assert all(same_bits(seen[name], frozen_at) for seen in s.seen)
    assert same_bits(p, frozen_at)
    p.requires_grad_(True)
    (s,) = run(opt, model, 1, first=4)
    assert not same_bits(s.seen[0][name], frozen_at)
    # ... and not from where it would be if it had not been frozen: one step moves it by about LR g z and no more.
    assert (p - frozen_at).abs().max() < 7 * LR * max(map(abs, s.gradients()))


@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO"])
def test_freezing_does_not_change_the_others(method: str) -> None:
    results = []
    for freeze in (False, True):
        model = block_mlp()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        run(opt, model, 2)
        model.head.weight.requires_grad_(not freeze)
        run(opt, model, 2, first=2)
        model.head.weight.requires_grad_(True)
        run(opt, model, 1, first=4)
        results.append(snapshot(model))
    assert_same(*results, only=set(results[0]) - {"head.weight"})


@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO", "LeZO"])
def test_replaced_memory_changes_nothing(method: str) -> None:
    """p.data = a copy, before any step and between any two: the tables are built again."""
    results = []
    for replace in (False, True):
        model = block_mlp()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        held = []
        for step in range(7):
            if replace and step % 3 != 2:
                for p in model.parameters():
                    held.append(p.data)
                    p.data = p.data.clone()
            run(opt, model, 1, first=step)
        results.append(snapshot(model))
    assert_same(*results)


def loaded(model: nn.Module) -> None:
    model.load_state_dict(block_mlp(seed=1).state_dict())


def copied(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def assigned(model: nn.Module) -> None:
    for p, other in zip(model.parameters(), block_mlp(seed=1).parameters(), strict=True):
        p.data = other.data


def one_frozen(model: nn.Module) -> None:
    model.norm.weight.requires_grad_(False)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("anchor_every", [1, 5])
@pytest.mark.parametrize("change", [loaded, copied, assigned, one_frozen])
def test_svrg_goes_on_from_the_weights_it_finds(change: Callable, anchor_every: int, sparsity: float) -> None:
    """After a change from outside it takes an anchor there, or, if the weights are the same, may stay on its path."""
    ends = []
    for do in (lambda model: None, change):
        model = block_mlp()
        opt = zo.MeZOSVRG(model, lr=LR, eps=EPS, seed=SEED, anchor_every=anchor_every, sparsity=sparsity)
        run(opt, model, 3)
        do(model)
        before = snapshot(model)
        run(opt, model, 1, first=3)
        ends.append(snapshot(model))
    anchors = {n: opt.state[p]["anchor"] for n, p in model.named_parameters() if p.requires_grad}
    if change is not copied or not all(same_bits(ends[0][n], ends[1][n]) for n in ends[0]):
        assert_same(anchors, before)
        moved = torch.cat([(ends[1][n] != before[n]).flatten() for n in anchors])
        assert moved.float().mean() > 0.6 * (1 - sparsity)  # fewer weights are below the thresholds by now


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_became_smaller_at_the_same_address(method: str) -> None:
    """Elements that are no longer part of the parameter are somebody else's."""
    model = Holder(w=torch.randn(64))
    opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED, drop=0.0)
    run(opt, model, 1)
    whole = model.w.data
    model.w.data = whole[:16]
    rest, part = whole[16:].clone(), whole[:16].clone()
    run(opt, model, 2, first=1)
    assert same_bits(whole[16:], rest)
    assert not torch.equal(whole[:16], part)


def test_a_table_refuses_stale_memory() -> None:
    p = nn.Parameter(torch.ones(8))
    table = Table([Entry(p, p, 0)], ["p"])
    old = p.data
    p.data = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"memory was replaced"):
        table.apply(Pass([1], [[1.0]], [1.0]))
    assert torch.equal(old, torch.ones(8)) and torch.equal(p, torch.ones(8))


@pytest.mark.parametrize("method", METHODS)
def test_added_groups_take_part_from_the_next_step(method: str) -> None:
    results = []
    for add in (False, True):
        model, extra = block_mlp(), nn.Linear(4, 3)
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        run(opt, model, 2)
        if add:
            before = extra.weight.detach().clone()
            opt.add_param_group({"params": [("extra.weight", extra.weight)], "lr": 2 * LR})
        run(opt, model, 2, first=2)
        results.append(snapshot(model))
    assert not torch.equal(extra.weight, before)
    if method != "MeZOSVRG":  # which takes an anchor then
        assert_same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_an_added_group_that_is_frozen_changes_nothing(method: str) -> None:
    results = []
    for add in (False, True):
        model, extra = block_mlp(), nn.Linear(4, 3).requires_grad_(False)
        before = extra.weight.clone()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        run(opt, model, 2)
        if add:
            opt.add_param_group({"params": [("extra.weight", extra.weight)]})
        run(opt, model, 2, first=2)
        results.append(snapshot(model))
    assert_same(*results)
    assert same_bits(extra.weight, before)


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds and blocks.

FLOATS = st.floats(width=16, allow_nan=False)  # exact in float16 and float32; ties, zeros, subnormals, infinities


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    values=st.lists(FLOATS, min_size=1, max_size=40),
    repeat=st.integers(1, 3),
    sparsity=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chunk=st.sampled_from([1, 3, 1 << 20]),
)
def test_threshold_is_the_exact_percentile(values, repeat, sparsity, dtype, chunk) -> None:
    w = torch.tensor(values * repeat).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "_CHUNK", chunk)
        h = magnitude_threshold(w, sparsity)
    assert h == percentile(w, sparsity)
    taking_part = len(w) - math.floor(sparsity * len(w))
    assert (w.float().abs() <= h).sum() >= taking_part > (w.float().abs() < h).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threshold_of_a_large_tensor(dtype: torch.dtype) -> None:
    w = torch.randn((1 << 20) + 4097, generator=torch.Generator().manual_seed(1)).to(dtype)
    n = w.numel()
    for sparsity in (0.0, 1e-6, 0.5, 0.75, 1 - 1e-6, math.nextafter(1.0, 0.0)):
        expected = w.float().abs().kthvalue(n - math.floor(sparsity * n)).values.item()
        assert magnitude_threshold(w.view(-1, 1), sparsity) == expected
    assert magnitude_threshold(w[:0], 0.5) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_lezo_finds_the_blocks_of_a_transformer(family: str) -> None:
    pytest.importorskip("transformers")
    build, stacks = FAMILIES[family]
    torch.manual_seed(0)
    model = build(layers=3).eval()
    blocks = find_blocks(model)
    assert len(blocks) == 3 * stacks
    owners = block_of_parameters(blocks)
    assert set(owners.values()) == set(range(3 * stacks))

    opt = zo.LeZO(model, lr=1e-2, eps=EPS, seed=SEED, drop=0.5)
    start, losses = snapshot(model), []
    counts = dict.fromkeys(range(3 * stacks), 0)
    for _ in range(8):
        before = snapshot(model)
        losses.append(opt.step(lambda: family_loss(family, model)).item())
        moved = {n for n, p in model.named_parameters() if not same_bits(p, before[n])}
        dropped = {i for p, i in owners.items() if not same_bits(p, before[name_of(model, p)])}
        dropped = set(range(3 * stacks)) - dropped
        assert len(dropped) == round(0.5 * 3 * stacks)
        assert moved == {n for n, p in model.named_parameters() if owners.get(p) not in dropped}
        for i in dropped:
            counts[i] += 1
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) == 8
    assert all(0 < c < 8 for c in counts.values()), counts
    assert not any(same_bits(start[n], p) for n, p in model.named_parameters())


def name_of(model: nn.Module, parameter: Tensor) -> str:
    return next(n for n, p in model.named_parameters() if p is parameter)


def test_lists_inside_a_block_are_part_of_it() -> None:
    model = Experts(depth=3)
    assert find_blocks(model) == list(model.layers)


def test_plain_lists_are_not_blocks() -> None:
    """Lists of leaves, of one member, or of different classes."""
    model = nn.Module()
    model.leaves = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.one = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    model.mixed = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.ModuleList([nn.Linear(2, 2)])])
    with pytest.raises(ValueError, match=r"drop: found no list of transformer blocks in Module"):
        find_blocks(model)


def test_parameters_that_blocks_share_are_never_dropped() -> None:
    model = block_mlp(depth=4)
    model.blocks[2].up = model.blocks[0].up
    opt = zo.LeZO(model, lr=LR, seed=SEED, drop=0.75)
    for step in range(6):
        before = snapshot(model)
        run(opt, model, 1, first=step)
        assert not same_bits(before["blocks.0.up.weight"], model.blocks[0].up.weight)


def test_blocks_may_be_told() -> None:
    model = block_mlp(depth=4)
    opt = zo.LeZO(model.named_parameters(), lr=LR, seed=SEED, drop=0.5, blocks=[model.embed, model.head])
    kept = {"embed.weight": 0, "head.weight": 0}
    for step in range(12):
        before = snapshot(model)
        run(opt, model, 1, first=step)
        unmoved = {n for n, p in model.named_parameters() if same_bits(p, before[n])}
        assert unmoved in ({"embed.weight", "embed.bias"}, {"head.weight", "head.bias"})
        for n in unmoved & set(kept):
            kept[n] += 1
    assert min(kept.values()) > 0


@pytest.mark.parametrize("n, drop", [(2, 0.5), (4, 0.75), (12, 0.75), (12, 0.1), (32, 0.9), (3, 0.99)])
def test_blocks_are_dropped_uniformly(n: int, drop: float) -> None:
    steps, k = 2000, min(round(drop * n), n - 1)
    counts, pairs = torch.zeros(n), torch.zeros(n, n)
    for step in range(steps):
        dropped = dropped_blocks(n, drop, direction_seed(SEED, step, 2**20 - 1))
        assert len(dropped) == k
        hit = torch.zeros(n)
        hit[list(dropped)] = 1
        counts += hit
        pairs += hit[:, None] * hit
    p = k / n
    assert ((counts / steps - p).abs() < SIGMAS * math.sqrt(p * (1 - p) / steps)).all()
    if n > 2:
        q = p * (k - 1) / (n - 1)  # two given blocks together
        others = pairs[~torch.eye(n, dtype=torch.bool)] / steps
        assert ((others - q).abs() <= SIGMAS * math.sqrt(q * (1 - q) / steps)).all()


# ---------------------------------------------------------------------------------------------------------------------
# MeZO-SVRG.

SVRG: dict[str, dict[str, Any]] = {
    "every step": {"anchor_every": 1},
    "every second": {"anchor_every": 2},
    "every fifth": {"anchor_every": 5},
    "separate directions": {"anchor_every": 3, "shared_direction": False},
    "2 directions, weight decay": {"anchor_every": 4, "directions": 2, "weight_decay": 0.5},
    "sparse, layers dropped, separate": {
        "anchor_every": 3,
        "sparsity": 0.4,
        "drop": 0.5,
        "shared_direction": False,
        "weight_decay": 0.2,
    },
}


@pytest.mark.parametrize("spec", SVRG)
def test_svrg_is_the_published_recursion(spec: str, passes: list[set[str]]) -> None:
    options, anchor_lr = SVRG[spec], 0.07
    q, n = options["anchor_every"], options.get("directions", 1)
    wd, shared = options.get("weight_decay", 0.0), options.get("shared_direction", True)
    model = block_mlp()
    opt = zo.MeZOSVRG(model, lr=LR, anchor_lr=anchor_lr, eps=EPS, seed=SEED, **options)
    start = snapshot(model)
    reference = Reference(start, exempt=is_exempt(model))
    h = {name: percentile(t, options["sparsity"]) for name, t in start.items()} if "sparsity" in options else {}

    for step in range(2 * q + 2):
        mini, full = Script(model, 1000 * step), Script(model, 1000 * step + 500)
        before = snapshot(model)
        passes.clear()
        opt.step(mini, full)
        after = snapshot(model)
        seeds = [direction_seed(SEED, step, k) for k in range(n)]

        if step % q == 0:
            assert (len(mini.seen), len(full.seen), len(passes)) == (0, 2 * n, 2 * n + 1)
            anchor, theta = before, before  # law 5: from now on, until the next
            masks = clean_masks(anchor, h)
            dropped = untouched_blocks(model, before, full.seen[0], masks)
            assert len(dropped) == round(options.get("drop", 0.0) * len(model.blocks))
            untouched = set().union(*(block_names(model)[i] for i in dropped))
            anchor_seeds = [direction_seed(SEED, step, ANCHOR_SLOT + k) for k in range(n)]
            full_gradient = dict(zip(anchor_seeds, [g / n for g in full.gradients()], strict=True))
            probes = [(full.seen, anchor, anchor_seeds)]
            estimate, rate, n_updates = dict(full_gradient), anchor_lr, n
        else:
            assert (len(mini.seen), len(full.seen), len(passes)) == (4 * n, 0, 4 * n + 1)
            there_seeds = seeds if shared else [direction_seed(SEED, step, SEPARATE_SLOT + k) for k in range(n)]
            probes = [(mini.seen[: 2 * n], theta, seeds), (mini.seen[2 * n :], anchor, there_seeds)]
            estimate, rate = dict(full_gradient), LR
            for s, g in zip(seeds, mini.gradients(n=n), strict=True):
                estimate[s] = estimate.get(s, 0.0) + g / n
            for s, g in zip(there_seeds, mini.gradients(first=2 * n), strict=True):
                estimate[s] = estimate.get(s, 0.0) - g / n
            n_updates += 2 * n

        # Weights are rewritten from the anchor, along all directions since: no coefficient exceeds 1 here.
        tolerance = step_in_place(magnitude(before, after), EPS, [1.0] * n_updates)
        for seen, base, along in probes:
            signed = [(s, e) for s in along for e in (EPS, -EPS)]
            for w, (s, e) in zip(seen, signed, strict=True):
                assert_close(w, reference.move(base, {s: e}, masks, untouched), tolerance)
        minus = {s: -rate * g for s, g in estimate.items()}
        theta = reference.move(theta, minus, masks, untouched, 1 - rate * wd)
        assert_close(after, theta, tolerance)

        for name, p in model.named_parameters():
            assert same_bits(opt.state[p]["anchor"], anchor[name])
            assert opt.state[p]["anchor"].data_ptr() != p.data_ptr()
            keep = torch.ones_like(masks[name]) if name in untouched else ~masks[name]
            assert same_bits(after[name][keep], anchor[name][keep])


def least_squares(d: int = 20, n: int = 64, batch: int = 8) -> tuple[Holder, Callable, Callable]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(d, generator=generator, dtype=torch.float64) + torch.randn(n, generator=generator)
    model = Holder(w=torch.zeros(d))

    def loss(rows: Tensor | slice) -> float:
        return (0.5 * (x[rows] @ model.w.double() - y[rows]) ** 2).mean().item()

    def minibatch(i: int) -> float:
        return loss(torch.randperm(n, generator=torch.Generator().manual_seed(i))[:batch])

    return model, minibatch, lambda: loss(slice(None))


def difference_of_estimates(shared: bool, draw: int) -> Tensor:
    """estimate(I, θ) - estimate(I, θ̄) of one step, for θ and θ̄ that are the same in all draws."""
    model, minibatch, full = least_squares()
    anchor, anchor_lr = model.w.detach().double(), 0.03
    opt = zo.MeZOSVRG(model, lr=1.0, anchor_lr=anchor_lr, seed=SEED, shared_direction=shared)
    opt.step(full, full)
    theta = model.w.detach().double()
    opt.seed = draw
    opt.step(lambda: minibatch(draw), full)
    full_gradient = (anchor - theta) / anchor_lr
    return (theta - model.w.detach().double()) - full_gradient


def test_a_shared_direction_has_the_lower_variance() -> None:
    """On least squares, a tenth of the way from anchor to solution.

    With H the Hessian of a batch and δ = θ - θ̄ the variances are about

    shared:   E |z z' H δ|^2                       = (d + 2) |H δ|^2
    separate: E |z z' ∇f(θ)|^2 + |y y' ∇f(θ̄)|^2 - ... = (d + 1) (|∇f(θ)|^2 + |∇f(θ̄)|^2) + |H δ|^2
    """
    draws = range(200)
    shared, separate = (
        torch.stack([difference_of_estimates(choice, i) for i in draws]).var(0).sum().item() for choice in (True, False)
    )
    assert shared * SHARED_DIRECTION_FACTOR < separate


# ---------------------------------------------------------------------------------------------------------------------
# Closures that fail.

CALLS = {"MeZO": 4, "SparseMeZO": 4, "LeZO": 4, "MeZOSVRG": 8}  # of the closure, in a step of two directions
FAILURES: dict[str, tuple[Any, type[BaseException], str]] = {
    "raises": (RuntimeError("out of cake"), RuntimeError, r"out of cake"),
    "interrupted": (KeyboardInterrupt(), KeyboardInterrupt, r"^$"),
    "None": (None, TypeError, r"closure: expected a scalar loss.*got NoneType"),
    "str": ("1.0", TypeError, r"closure: expected a scalar loss.*got str"),
    "bool": (True, TypeError, r"closure: expected a scalar loss.*got bool"),
    "bool tensor": (torch.tensor(True), TypeError, r"closure: expected a scalar loss.*got bool"),
    "complex tensor": (torch.tensor(1j), TypeError, r"closure: expected a scalar loss.*got complex"),
    "vector": (torch.ones(2), ValueError, r"closure: expected a scalar loss, got a tensor of shape \(2,\)"),
    "empty": (torch.ones(0), ValueError, r"closure: expected a scalar loss, got a tensor of shape \(0,\)"),
    "nan": (torch.tensor(math.nan), ValueError, r"closure: expected a finite loss, got nan"),
    "inf": (math.inf, ValueError, r"closure: expected a finite loss, got inf"),
    "-inf": (torch.tensor(-math.inf, dtype=torch.bfloat16), ValueError, r"closure: expected a finite loss, got -inf"),
}


class FailsAt(Script):
    """Returns or raises `what` at one call."""

    def __init__(self, model: nn.Module, call: int, what: Any):
        super().__init__(model)
        self.call, self.what = call, what

    def __call__(self) -> Any:
        loss = super().__call__()
        if len(self.seen) - 1 != self.call:
            return loss
        if isinstance(self.what, BaseException):
            raise self.what
        return self.what


def calls(method: str, failure: str) -> Iterator[tuple[int, int]]:
    """(steps before, failing call): every call of a step for two failures, the first and the last for the others."""
    for steps, n in ((1, CALLS[method]), (0, 4)):  # of MeZOSVRG a step between anchors, and an anchor's
        yield from ((steps, call) for call in range(n) if failure in ("raises", "nan") or call in (0, n - 1))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_fails_leaves_restored_weights(method: str, failure: str) -> None:
    what, error, message = FAILURES[failure]
    refused = not isinstance(what, BaseException)
    for steps, call in calls(method, failure):
        model = block_mlp(depth=2)
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED, directions=2)
        run(opt, model, steps)
        before = snapshot(model)
        closure = FailsAt(model, call, what)
        with pytest.raises(error, match=message):
            take_step(opt, closure)
        assert len(closure.seen) == call + 1
        after = snapshot(model)
        if method == "MeZOSVRG":
            assert_same(before, after)
        else:
            exact = {n: t.double() for n, t in before.items()}
            assert_close(after, exact, step_in_place(magnitude(before), EPS, [0.0, 0.0]))
        assert opt.refused_steps == refused

        # The next step works. After a refusal it draws anew: the same directions might fail for ever.
        (again,) = run(opt, model, 1)
        if refused:
            assert ((again.seen[0]["head.weight"] - closure.seen[0]["head.weight"]).abs() > EPS / 10).any()
        assert opt.refused_steps == refused


@pytest.mark.parametrize("method", METHODS)
def test_differences_that_overflow_are_refused(method: str) -> None:
    """Finite losses whose estimate, or whose update in float32, is not finite must not reach the weights."""
    for losses in ((1e308, -1e308), (1e200, 0.0), (1e40, 0.0)):
        model = block_mlp()
        opt = METHODS[method](model, lr=LR, eps=EPS, seed=SEED)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"closure: "):
            take_step(opt, iter(losses).__next__)
        assert_close(snapshot(model), {n: t.double() for n, t in before.items()}, step_in_place(9.0, EPS, [0.0]))
        assert opt.refused_steps == 1


# ---------------------------------------------------------------------------------------------------------------------
# Saving, loading and copying.


def real_loss(model: nn.Module, data: int) -> Tensor:
    generator = torch.Generator().manual_seed(data)
    x, y = torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


def go_on(opt: zo.ZeroOrderOptimizer, model: nn.Module, steps: range) -> list[float]:
    """Steps on real losses; the data go by the step."""
    return [take_step(opt, lambda i=i: real_loss(model, i), lambda: real_loss(model, 1000)).item() for i in steps]


def assert_same_future(a: tuple[Any, nn.Module], b: tuple[Any, nn.Module], steps: range) -> None:
    assert go_on(*a, steps) == go_on(*b, steps)
    assert_same(snapshot(a[1]), snapshot(b[1]))


OPTIONS = st.fixed_dictionaries(
    {
        "directions": st.integers(1, 2),
        "sparsity": st.sampled_from([0.0, 0.5]),
        "drop": st.sampled_from([0.0, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
    }
)


def build(method: str, model: nn.Module, seed: int = SEED, **options: Any) -> zo.ZeroOrderOptimizer:
    if method == "MeZOSVRG":
        options = {"anchor_lr": 1e-2, "anchor_every": 4, **options}
    return METHODS[method](model, lr=1e-2, eps=EPS, seed=seed, perturb="in_place", **options)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    method=st.sampled_from(list(METHODS)),
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    steps=st.integers(0, 9),
    model_first=st.booleans(),
)
def test_a_loaded_run_goes_on_bit_for_bit(method, options, dtype, steps, model_first) -> None:
    model = block_mlp(depth=2, dtype=dtype)
    opt = build(method, model, **options)
    go_on(opt, model, range(steps))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only: nothing but tensors and plain values

    other = block_mlp(depth=2, dtype=dtype, seed=1)
    other_opt = build(method, other, seed=SEED + 1, **options)
    if model_first:
        other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    other.load_state_dict(saved["model"])
    assert_same(snapshot(model), snapshot(other))
    assert_same_future((opt, model), (other_opt, other), range(steps, steps + 6))
    assert other_opt.step_count == steps + 6


@pytest.mark.parametrize("steps", range(9))
@pytest.mark.parametrize("shared", [True, False])
def test_svrg_resumes_at_every_point_of_a_period(steps: int, shared: bool) -> None:
    """The optimizer alone brings the weights back, and shares no memory with the state it was given."""
    options = {"sparsity": 0.3, "drop": 0.5, "shared_direction": shared}
    model, other = block_mlp(), block_mlp()
    opt, other_opt = build("MeZOSVRG", model, **options), build("MeZOSVRG", other, **options)
    go_on(opt, model, range(steps))
    state = opt.state_dict()
    other_opt.load_state_dict(state)
    assert_same(snapshot(model), snapshot(other))
    theirs = {t.data_ptr() for p in state["state"].values() for t in p.values()}
    assert not theirs & {t.data_ptr() for p in other_opt.state.values() for t in p.values()}
    kept = copy.deepcopy(state)
    go_on(other_opt, other, range(steps, steps + 6))
    assert {k: str(v) for k, v in kept.items()} == {k: str(v) for k, v in state.items()}
    go_on(opt, model, range(steps, steps + 6))
    assert_same(snapshot(model), snapshot(other))
    assert kept["zo"] == state["zo"]  # tensors of a state are torch's affair; the rest is ours to copy


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copied_optimizer_goes_on_bit_for_bit(method: str, scheduled: bool, how: str) -> None:
    model = block_mlp()
    opt = build(method, model, sparsity=0.5)
    if scheduled:  # a scheduler puts a wrapped step into the optimizer
        torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1.0)
    go_on(opt, model, range(6))
    pair = (opt, model)
    other_opt, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = snapshot(model)
    ours = go_on(other_opt, other, range(6, 12))
    assert_same(before, snapshot(model))  # the copy steps its own weights
    assert go_on(opt, model, range(6, 12)) == ours
    assert_same(snapshot(model), snapshot(other))


def renamed(model: nn.Module) -> nn.Module:
    other = nn.Module()
    other.other = model
    return other


WRONG_STATES: dict[str, tuple[Callable[[], zo.ZeroOrderOptimizer], str]] = {
    "other names": (lambda: zo.MeZO(renamed(block_mlp()), lr=LR), r"param_ids"),
    "not zeroth order": (lambda: torch.optim.SGD(block_mlp().parameters(), lr=LR), r"zeroth-order"),
    "more parameters": (lambda: zo.MeZO(grown(block_mlp()), lr=LR), r"param_ids"),
}


@pytest.mark.parametrize("state", WRONG_STATES)
@pytest.mark.parametrize("method", METHODS)
def test_states_of_something_else_are_refused(method: str, state: str) -> None:
    source, message = WRONG_STATES[state]
    model = block_mlp()
    opt = build(method, model)
    go_on(opt, model, range(2))
    ours, before = copy.deepcopy(opt.state_dict()), snapshot(model)
    with pytest.raises(ValueError, match=rf"state_dict: .*{message}"):
        opt.load_state_dict(source().state_dict())
    assert str(opt.state_dict()) == str(ours)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method, source", [("MeZOSVRG", "MeZO"), ("MeZO", "MeZOSVRG")])
def test_states_of_another_method_are_refused(method: str, source: str) -> None:
    model, other = block_mlp(), block_mlp()
    opt, other_opt = build(method, model), build(source, other)
    go_on(opt, model, range(2))
    go_on(other_opt, other, range(3))
    ours, before = copy.deepcopy(opt.state_dict()), snapshot(model)
    with pytest.raises(ValueError, match=r"state_dict: "):
        opt.load_state_dict(other_opt.state_dict())
    assert str(opt.state_dict()) == str(ours)
    assert_same(before, snapshot(model))


# ---------------------------------------------------------------------------------------------------------------------
# An optimizer like any other.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5**i),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=4),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 2 * LR, total_steps=6, cycle_momentum=False),
    "SequentialLR": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [
            torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(opt, 0.5),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_set_the_rate(scheduler: str) -> None:
    model = Holder(w=torch.randn(40))
    opt = zo.MeZO(model, lr=LR, eps=EPS, seed=SEED)
    schedule = SCHEDULERS[scheduler](opt)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as "scheduler.step() before optimizer.step()"
        for step in range(5):
            rates.append(opt.param_groups[0]["lr"])
            before = snapshot(model)
            (closure,) = run(opt, model, 1, first=step)
            update = -rates[-1] * closure.gradients()[0]
            expected = Reference(before).move(
                before, {direction_seed(SEED, step, 0): update}, {"w": torch.ones(40, dtype=torch.bool)}
            )
            assert_close(snapshot(model), expected, step_in_place(magnitude(before) + 1, EPS, [update]))
            schedule.step()
    assert len(set(rates)) > 2


def test_a_rate_may_be_a_tensor() -> None:
    results = []
    for lr in (0.125, torch.tensor(0.125)):
        model = block_mlp()
        run(zo.MeZO(model, lr=lr, seed=SEED), model, 2)
        results.append(snapshot(model))
    assert_same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_step_returns_the_mean_loss(method: str) -> None:
    model = block_mlp()
    opt = METHODS[method](model, lr=LR, eps=EPS, directions=2)
    for step in range(3):
        script = Script(model, 10 * step)
        loss = take_step(opt, script)
        assert isinstance(loss, Tensor) and loss.shape == () and not loss.requires_grad
        assert loss.item() == pytest.approx(sum(script.losses[:4]) / 4, rel=1e-12)
    floats = iter([1.0, 2, 3.0, 6.0] * 2)
    loss = take_step(opt, floats.__next__)
    assert isinstance(loss, float) and loss == 3.0


def test_a_closure_may_reuse_its_tensor() -> None:
    """As one that writes the loss into a fixed buffer."""
    buffer, losses = torch.zeros(()), iter([1.0, 3.0])
    opt = zo.MeZO(block_mlp(), lr=LR)
    assert opt.step(lambda: buffer.fill_(next(losses))) == 2.0


@pytest.mark.parametrize("method", METHODS)
def test_closures_run_without_gradients_and_zero_grad_is_harmless(method: str) -> None:
    model, seen = block_mlp(), []
    opt = METHODS[method](model, lr=LR)

    def closure() -> Tensor:
        opt.zero_grad()
        seen.append(torch.is_grad_enabled())
        return real_loss(model, 0)

    for _ in range(2):
        opt.zero_grad(set_to_none=False)
        take_step(opt, closure)
    assert torch.is_grad_enabled() and not any(seen)
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_autograd_sees_that_weights_changed(method: str) -> None:
    """A graph that saved a weight before the step must not be run backwards after it."""
    model = block_mlp()
    opt = METHODS[method](model, lr=LR, drop=0.0)
    versions = [p._version for p in model.parameters()]
    loss = real_loss(model, 0)
    run(opt, model, 1)
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_warn_once(method: str, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"16-bit weights in place.*perturb='in_place'") as caught:
        METHODS[method](block_mlp(dtype=dtype), lr=LR)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the user's line, not ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS[method](block_mlp(dtype=dtype), lr=LR, perturb="in_place")
        METHODS[method](block_mlp(), lr=LR)


@pytest.mark.parametrize("rounding, stochastic", [("auto", True), ("stochastic", True), ("nearest", False)])
@pytest.mark.parametrize("method", METHODS)
def test_rounding_reaches_the_passes(method: str, rounding: str, stochastic: bool) -> None:
    """Probes and updates of less than half an ulp: to nearest nothing ever moves, stochastically some weights do."""
    start = torch.full((1 << 16,), 1.5, dtype=torch.bfloat16)  # an ulp is 2^-7
    model, eps = Holder(w=start), 2.0**-12
    options = {"anchor_lr": 2.0**-17} if method == "MeZOSVRG" else {}
    opt = METHODS[method](
        model, lr=2.0**-17, eps=eps, drop=0.0, sparsity=0.0, perturb="in_place", rounding=rounding, **options
    )
    take_step(opt, iter([1 + 2 * eps, 1.0]).__next__)  # g = 1
    assert (model.w != start).any() == stochastic


@pytest.mark.parametrize("backend", ["reference", "native:scalar"])
@pytest.mark.parametrize("method", METHODS)
def test_backend_reaches_the_passes_and_makes_no_difference(
    method: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, results = [], []
    resolve = backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda name, where: asked.append(name) or resolve(name, where))
    for name in (None, backend):
        model = block_mlp(depth=2)
        run(METHODS[method](model, lr=LR, eps=EPS, seed=SEED, sparsity=0.5, weight_decay=0.1, backend=name), model, 3)
        results.append(snapshot(model))
    assert set(asked) == {None, backend}
    assert_same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_the_loss(method: str) -> None:
    """Nothing subtle: eight points, the same in every step."""
    model = block_mlp()
    options = {"MeZOSVRG": {"anchor_lr": 0.03}, "SparseMeZO": {"sparsity": 0.25}, "LeZO": {"drop": 0.5}}
    opt = METHODS[method](model, lr=0.03, seed=SEED, directions=4, **options.get(method, {}))
    losses = [take_step(opt, lambda: real_loss(model, 0)).item() for _ in range(60)]
    assert losses[-1] < 0.85 * losses[0]
