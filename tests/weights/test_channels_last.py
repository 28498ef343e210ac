"""Runs of weights that are dense, not contiguous: bit for bit those of contiguous ones, given the same losses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import tables_of
from scripted import EPS, LR, METHODS, SEED, assert_same, script, snapshot, take_step
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.backends import staged
from zo_kernels.weights.percentiles import magnitude_percentile
from zo_kernels.weights.shards import shard_of

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIONS: dict[str, dict[str, Any]] = {"MeZO": {"directions": 2}, "MeZOSVRG": {"anchor_every": 3, "sparsity": 0.5}}
BACKENDS = ["native", "reference"]  # in one call, and staged


class Net(nn.Module):
    """Convolutions, one of which is contiguous in channels_last too but has other strides, and a matrix, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)
        self.point, self.second, self.head = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 5, 3, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.point(self.first(x))))
        return self.head(self.second(x).mean((2, 3)))


def net(layout: str = "channels_last", dtype: torch.dtype = torch.float32) -> Net:
    """Of the same values whatever the layout."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Net().to(dtype)
    if layout != "contiguous":
        model.to(memory_format=LAYOUTS[layout])
        model.head.weight = nn.Parameter(model.head.weight.data.t().contiguous().t())
    return model


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: p.stride() for name, p in model.named_parameters()}


class Runs:
    """A closure that runs the model, notes the strides of the weights in its modules' forwards, and returns scripted
    losses.
    """

    def __init__(self, model: Net, first: int):
        self.model, self.first, self.calls = model, first, 0
        self.seen: list[dict[str, tuple[int, ...]]] = []
        self.weights: list[dict[str, Tensor]] = []

    def __call__(self) -> Tensor:
        seen: dict[str, tuple[int, ...]] = {}
        weights: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            def hook(m: nn.Module, args: Any) -> None:
                for p, t in m.named_parameters(name, recurse=False):
                    seen[p], weights[p] = t.stride(), t.detach().clone()

            return hook

        hooks = [m.register_forward_pre_hook(note(name)) for name, m in self.model.named_modules()]
        self.model(torch.ones(1, 3, 6, 6, dtype=self.model.head.weight.dtype))
        for hook in hooks:
            hook.remove()
        self.seen.append(seen)
        self.weights.append(weights)
        self.calls += 1
        return torch.tensor(script(self.first + self.calls), dtype=torch.float64)


def steps(opt: zo.ZeroOrderOptimizer, model: Net, n: int, first: int = 0) -> list[Runs]:
    made = [Runs(model, 100 * (first + i)) for i in range(n)]
    for closure in made:
        take_step(opt, closure)
    return made


def optimizer(method: str, model: Net, **options: Any) -> zo.ZeroOrderOptimizer:
    blocks = {"blocks": [model.first, model.second]} if method == "LeZO" else {}
    return METHODS[method](model, lr=LR, eps=EPS, seed=SEED, **blocks, **OPTIONS.get(method, {}), **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("perturb", "dtype"), [("in_place", torch.float32), ("in_forward", torch.bfloat16)], ids=["in place", "in forward"]
)
def test_a_run_is_that_of_contiguous_weights(method: str, perturb: str, dtype: torch.dtype) -> None:
    """Backends too: what is native and what is staged."""
    ends, perturbed = [], []
    for layout, backend in [("contiguous", "native"), *(("channels_last", backend) for backend in BACKENDS)]:
        model = net(layout, dtype)
        before = strides(model)
        assert (layout == "contiguous") == model.first.weight.is_contiguous()
        opt = optimizer(method, model, perturb=perturb, backend=backend)
        # In inference mode, what is made may be what cannot be written to elsewhere.
        with torch.inference_mode(backend == "reference" and perturb == "in_forward"):
            made = steps(opt, model, 5)
        assert strides(model) == before
        # A module that sees other strides may run another kernel, which rounds in another way.
        assert all(seen == before for closure in made for seen in closure.seen)
        ends.append(snapshot(model))
        perturbed.append([w for closure in made for w in closure.weights])
    for end, seen in zip(ends[1:], perturbed[1:], strict=True):
        assert_same(end, ends[0])
        for a, b in zip(seen, perturbed[0], strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("method", ["SparseMeZO", "MeZOSVRG"])
@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_a_trajectory_is_replayed_in_another_layout(tmp_path: Path, method: str, perturb: str) -> None:
    model = net("channels_last")
    opt = optimizer(method, model, trajectory=tmp_path / "run.zot", perturb=perturb)
    steps(opt, model, 4)
    for layout, backend in (("contiguous", "native"), ("channels_last", "native"), ("channels_last", "reference")):
        again = net(layout)
        before = strides(again)
        zo.replay(again, opt.trajectory, backend=backend)
        assert_same(snapshot(again), snapshot(model))
        assert strides(again) == before


@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO"])
def test_the_layout_may_change_between_steps(method: str) -> None:
    """Also where the memory stays, and only its strides are others."""
    ends = []
    for change in (False, True):
        model = net("contiguous")
        model.head.weight = nn.Parameter(torch.eye(5)[:4, :4].clone())  # which is equal to its transpose
        model.second.weight = nn.Parameter(model.second.weight.data[:4].clone())
        opt = optimizer(method, model, perturb="in_place")
        if change:
            model.head.weight.data = model.head.weight.data.t()
        steps(opt, model, 1)
        if change:
            model.to(memory_format=torch.channels_last)
        steps(opt, model, 2, first=1)
        if change:
            model.to(memory_format=torch.contiguous_format)
        steps(opt, model, 1, first=3)
        ends.append(snapshot(model))
    assert_same(*ends)


@pytest.mark.parametrize(("saved", "loaded"), [("channels_last", "contiguous"), ("contiguous", "channels_last")])
@pytest.mark.parametrize("execution_device", [None, "cpu"])
def test_a_state_goes_on_in_another_layout(saved: str, loaded: str, execution_device: str | None) -> None:
    """In the middle of a period of MeZO-SVRG, whose anchor has the layout that it was saved in."""
    options: dict[str, Any] = {"perturb": "in_forward", "execution_device": execution_device}
    model = net(saved)
    opt = optimizer("MeZOSVRG", model, **options)
    steps(opt, model, 2)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    steps(opt, model, 3, first=2)
    file.seek(0)
    weights, state = torch.load(file)
    other = net(loaded)
    before = strides(other)
    other.load_state_dict(weights)
    again = optimizer("MeZOSVRG", other, **options)
    again.load_state_dict(state)
    made = steps(again, other, 3, first=2)
    assert_same(snapshot(other), snapshot(model))
    assert all(seen == before for closure in made for seen in closure.seen)


def test_weights_of_another_device() -> None:
    """What is streamed keeps its layout, what is frozen, too; one that has gaps is given none."""
    ends = []
    for layout in ("contiguous", "channels_last"):
        model = net(layout)
        model.second.weight.requires_grad_(False)
        model.norm.weight = nn.Parameter(torch.ones(1).expand(6), requires_grad=False)
        opt = optimizer("SparseMeZO", model, perturb="in_forward", execution_device="cpu")
        before = strides(model) | {"norm.weight": (1,)}
        made = steps(opt, model, 3)
        assert all(seen == before for closure in made for seen in closure.seen)
        ends.append(snapshot(model))
    assert_same(*ends)


def test_thresholds() -> None:
    for layout in LAYOUTS:
        model = net(layout)
        for name, p in model.named_parameters():
            rank = p.numel() - int(0.3 * p.numel())
            assert magnitude_percentile(shard_of(name, p), 0.3).h == p.abs().flatten().sort().values[rank - 1], name


def test_staged_memory_is_that_of_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all tables of an optimizer, those of modules' forwards, too."""
    monkeypatch.setattr(staged, "MOST_BYTES", 1024)
    made: list[staged.Staging] = []
    monkeypatch.setattr(staged.Staging, "__init__", lambda self: (setattr(self, "_memory", {}), made.append(self))[0])
    model = net("channels_last")
    opt = optimizer("MeZO", model, perturb="in_forward", backend="reference")
    steps(opt, model, 2)
    assert made == [tables_of(opt).staging]
    [memory] = made[0]._memory[torch.device("cpu")]
    assert memory.numel() <= 1024 < sum(p.nbytes for p in model.parameters() if not p.is_contiguous())
