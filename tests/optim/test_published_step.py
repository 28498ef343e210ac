"""A step is the published step, and its estimate is unbiased (law 6)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from models import Holder, block_mlp
from scripted import (
    EPS,
    LR,
    SEED,
    Noise,
    Reference,
    assert_close,
    assert_same,
    block_names,
    clean_masks,
    heights,
    is_exempt,
    magnitude,
    percentile,
    run,
    same_bits,
    snapshot,
    take_step,
    untouched_blocks,
)
from tolerances import SIGMAS, loss_slope, step_in_place
from torch import nn

import zo_kernels as zo
from zo_kernels.spec import direction_seed

STEPS: dict[str, tuple[type, dict[str, Any]]] = {
    "MeZO": (zo.MeZO, {}),
    "MeZO, 3 directions": (zo.MeZO, {"directions": 3}),
    "MeZO, weight decay": (zo.MeZO, {"weight_decay": 0.5}),
    "SparseMeZO": (zo.SparseMeZO, {"sparsity": 0.6}),
    "SparseMeZO, kept": (zo.SparseMeZO, {"sparsity": 0.6, "mask": "kept"}),
    "LeZO": (zo.LeZO, {"drop": 0.5}),
    "Sparse-LeZO, 3 directions, weight decay": (
        zo.LeZO,
        {"drop": 0.75, "sparsity": 0.3, "directions": 3, "weight_decay": 0.5},
    ),
    "Sparse-LeZO, 3 directions, weight decay, signs": (
        zo.LeZO,
        {"drop": 0.5, "sparsity": 0.3, "directions": 3, "weight_decay": 0.5, "distribution": "rademacher"},
    ),
    "FZOO": (zo.FZOO, {"directions": 4, "weight_decay": 0.5, "distribution": "rademacher"}),
    "FZOO, normals, masks, blocks": (
        zo.FZOO,
        {"directions": 3, "sparsity": 0.3, "drop": 0.5, "distribution": "normal"},
    ),
    "one-sided": (zo.MeZO, {"estimator": "one_sided"}),
    "std": (zo.MeZO, {"normalize": "std", "directions": 3}),
    "rms": (zo.MeZO, {"normalize": "rms"}),
    "one-sided rms": (
        zo.LeZO,
        {"estimator": "one_sided", "normalize": zo.RMS(0.5, 0.25), "directions": 2, "drop": 0.5},
    ),
}


class Divisor:
    """What the g of a step are divided by, written as the papers have it (FZOO 2506.09034, MEAZO 2605.03869)."""

    def __init__(self, normalize: Any):
        self.kind = normalize
        self.beta, self.delta = (normalize.beta, normalize.delta) if isinstance(normalize, zo.RMS) else (0.99, 1e-8)
        self.v, self.t = 0.0, 0

    def of(self, losses: list[float], gradients: list[float], one_sided: bool) -> float:
        if self.kind == "none":
            return 1.0
        if self.kind == "std":  # of the losses, for one-sided estimates
            return stdev(losses[1:]) / EPS if one_sided else stdev(gradients)
        self.t += 1
        self.v = self.beta * self.v + (1 - self.beta) * fmean(g * g for g in gradients)
        return math.sqrt(self.v / (1 - self.beta**self.t)) + self.delta


@pytest.mark.parametrize("spec", STEPS)
def test_step_is_the_published_one(spec: str, passes: list[set[str]]) -> None:
    cls, options = STEPS[spec]
    n, decay = options.get("directions", 1), 1 - LR * options.get("weight_decay", 0.0)
    model = block_mlp()
    model.plane = nn.LayerNorm((2, 3))  # weights of two dimensions that must not be decayed all the same
    nn.init.normal_(model.plane.weight)
    with pytest.warns(UserWarning, match=r"left dense: .*plane\.bias") if "sparsity" in options else nullcontext():
        opt = cls(model, lr=LR, eps=EPS, seed=SEED, **options)
    start = snapshot(model)
    reference = Reference(start, exempt=is_exempt(model), distribution=options.get("distribution", "normal"))
    h = heights(start, options["sparsity"]) if "sparsity" in options else {}
    drops, first, redrawn = set(), clean_masks(start, h), False
    one_sided = cls is zo.FZOO or options.get("estimator") == "one_sided"
    divisor = Divisor("std" if cls is zo.FZOO else options.get("normalize", "none"))

    for step in range(4):
        before = snapshot(model)
        masks = clean_masks(before, h)
        redrawn |= any(not torch.equal(masks[name], first[name]) for name in masks)
        if "mask" in options:
            masks = first
        passes.clear()
        (closure,) = run(opt, model, 1, first=step)
        after = snapshot(model)

        if one_sided:
            assert_same(closure.seen.pop(0), before)
        dropped = untouched_blocks(model, before, closure.seen[0], masks)
        assert len(dropped) == round(options.get("drop", 0.0) * len(model.blocks))
        drops.add(frozenset(dropped))
        untouched = set().union(*(block_names(model)[i] for i in dropped))
        assert passes == [set(before) - untouched] * (n + 1 if one_sided else 2 * n + 1)

        seeds = [direction_seed(SEED, step, k) for k in range(n)]
        losses = closure.losses
        gradients = [(loss - losses[0]) / EPS for loss in losses[1:]] if one_sided else closure.gradients()
        d = divisor.of(losses, gradients, one_sided)
        updates = [-LR * g / (n * d) for g in gradients]
        tolerance = step_in_place(magnitude(before, after), EPS, updates)
        probes = [(seed, signed) for seed in seeds for signed in ((EPS,) if one_sided else (EPS, -EPS))]
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
    assert redrawn or "sparsity" not in options  # or kept masks would be those of each step


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


def test_thresholds_are_fixed_in_the_first_step() -> None:
    model = Holder(w=torch.linspace(0.1, 1.0, 100))
    opt = zo.SparseMeZO(model, lr=0.0, sparsity=0.5)
    run(opt, model, 1)
    with torch.no_grad():
        model.w.mul_(10)  # all but the first few are beyond the old threshold now
    model.w.data = model.w.data.clone()  # the tables must be built again, the threshold must not
    before = model.w.detach().clone()
    (closure,) = run(opt, model, 1)
    assert torch.equal(closure.seen[0]["w"] != before, before <= percentile(torch.linspace(0.1, 1.0, 100), 0.5))


# Law 6. Masks and anchors keep it, in the subspace they leave.
UNBIASED = {
    "MeZO": (zo.MeZO, {}),
    "MeZO, signs": (zo.MeZO, {"distribution": "rademacher"}),
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
    # Element i of z z' g has the variance |g|^2 + g_i^2; of signs |g|^2 - g_i^2, since z_i^2 = 1.
    own = -(gradient**2) if "distribution" in options else gradient**2
    error = torch.sqrt((gradient.norm() ** 2 + own) / n) * (gradient != 0)
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
