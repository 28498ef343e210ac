"""Steps with scripted losses, and the published step written plainly in float64 on the noise of the specification.

With a scripted loss the gradient estimates are known exactly, and what is compared is where the weights are at each
call of the closure and at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from models import BlockMLP
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import names
from zo_kernels.spec import box_muller, philox4x32

LR, EPS, SEED = 0.1, 0.02, 11
METHODS = {"MeZO": zo.MeZO, "SparseMeZO": zo.SparseMeZO, "LeZO": zo.LeZO, "MeZOSVRG": zo.MeZOSVRG, "FZOO": zo.FZOO}
# What a run's seeds mean (docs/noise.md, 6): a change of these would break the replay of logs.
ANCHOR_SLOT, SEPARATE_SLOT = 2**17, 2**18

Weights = dict[str, Tensor]


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

    def __init__(self, every: Weights, distribution: str = "normal"):
        self.draw = {"normal": self.normals, "rademacher": self.signs}[distribution]
        self.shapes = {name: t.shape for name, t in every.items()}
        ids = names.param_ids(every)
        sizes = [t.numel() for t in every.values()]
        self.index = torch.cat([torch.arange(n) for n in sizes])
        self.ids = torch.cat([torch.full((n,), ids[name]) for n, name in zip(sizes, every, strict=True)])
        self.sizes = sizes
        self.known: dict[int, Weights] = {}

    def __call__(self, seed: int) -> Weights:
        if seed not in self.known:
            z = self.draw((seed & 0xFFFFFFFF, seed >> 32)).double().split(self.sizes)
            self.known[seed] = {n: t.view(s) for (n, s), t in zip(self.shapes.items(), z, strict=True)}
        return self.known[seed]

    def normals(self, key: tuple[int, int]) -> Tensor:
        c = self.index >> 2
        x = philox4x32((c & 0xFFFFFFFF, c >> 32, self.ids, torch.zeros_like(c)), key)
        z = torch.stack([*box_muller(x[0], x[1]), *box_muller(x[2], x[3])])
        return z.gather(0, (self.index & 3)[None])[0]

    def signs(self, key: tuple[int, int]) -> Tensor:
        c, i = self.index // 128, self.index % 32
        x = torch.stack(philox4x32((c & 0xFFFFFFFF, c >> 32, self.ids, torch.ones_like(c)), key))
        word = x.gather(0, (self.index % 128 // 32)[None])[0]
        return 1 - 2 * (word >> (i // 2 + 16 * (i % 2)) & 1)


class Reference:
    """What a step should do, for weights given in float64."""

    def __init__(
        self, weights: Weights, *, exempt: Callable[[str], bool] = lambda name: False, distribution: str = "normal"
    ):
        self.z, self.exempt = Noise(weights, distribution), exempt

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


def heights(w: Weights, sparsity: float) -> dict[str, float]:
    """The threshold of each tensor but of those that are left dense: constant ones, and ones too small to leave any."""
    masked = {name: t for name, t in w.items() if int(sparsity * t.numel()) and t.abs().min() < t.abs().max()}
    return {name: percentile(t, sparsity) for name, t in masked.items()}


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
