"""An optimizer like any other of PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Holder, block_mlp, real_loss
from scripted import (
    EPS,
    LR,
    METHODS,
    SEED,
    Reference,
    Script,
    assert_close,
    assert_same,
    magnitude,
    run,
    snapshot,
    take_step,
)
from tolerances import step_in_place
from torch import Tensor

import zo_kernels as zo
from zo_kernels import backends
from zo_kernels.backends.gpu_table import GpuTable
from zo_kernels.backends.types import Entry
from zo_kernels.spec import direction_seed

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
        at = script.losses[: 1 if method == "FZOO" else 4]  # FZOO's first is at θ
        assert loss.item() == pytest.approx(sum(at) / len(at), rel=1e-12)
    floats = iter([1.0, 2, 3.0, 6.0] * 2)
    loss = take_step(opt, floats.__next__)
    assert isinstance(loss, float) and loss == (1.0 if method == "FZOO" else 3.0)


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
def test_sixteen_bit_weights_without_a_module_warn_once(method: str, dtype: torch.dtype) -> None:
    options = {"drop": 0.0} if method == "LeZO" else {}
    with pytest.warns(UserWarning, match=r"16-bit weights in place.*needs the module.*perturb='in_place'") as caught:
        opt = METHODS[method](block_mlp(dtype=dtype).parameters(), lr=LR, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the user's line, not ours
    assert opt.perturb == "in_place"


@pytest.mark.parametrize("method", METHODS)
def test_auto_perturbs_sixteen_bit_weights_in_the_forward(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, chosen in (
            (torch.float32, "in_place"),
            (torch.bfloat16, "in_forward"),
            (torch.float16, "in_forward"),
        ):
            assert METHODS[method](block_mlp(dtype=dtype), lr=LR).perturb == chosen
            assert METHODS[method](block_mlp(dtype=dtype), lr=LR, perturb="in_place").perturb == "in_place"
        mixed = block_mlp()
        mixed.head.to(torch.bfloat16)
        assert METHODS[method](mixed, lr=LR).perturb == "in_forward"


@pytest.mark.parametrize("rounding, stochastic", [("auto", True), ("stochastic", True), ("nearest", False)])
@pytest.mark.parametrize("method", METHODS)
def test_rounding_reaches_the_passes(method: str, rounding: str, stochastic: bool) -> None:
    """Probes and updates of less than half an ulp: to nearest nothing ever moves, stochastically some weights do."""
    start = torch.full((1 << 16,), 1.5, dtype=torch.bfloat16)  # an ulp is 2^-7
    model, eps = Holder(w=start), 2.0**-12
    options = {"MeZOSVRG": {"anchor_lr": 2.0**-17}, "FZOO": {"directions": 2}}.get(method, {})
    opt = METHODS[method](
        model, lr=2.0**-17, eps=eps, drop=0.0, sparsity=0.0, perturb="in_place", rounding=rounding, **options
    )
    take_step(opt, iter([1 + 2 * eps, 1.0, 1.0]).__next__)  # g = 1, FZOO's -2
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


def test_the_count_of_skipped_steps_can_be_set() -> None:
    opt = zo.MeZO(Holder(w=torch.ones(3)), lr=LR)
    with pytest.raises(ValueError, match="finite"):
        opt.step(lambda: float("nan"))
    opt.refused_steps = 0
    assert opt.refused_steps == opt.state_dict()["zo"]["refused_steps"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_the_loss(method: str) -> None:
    """Nothing subtle: eight points, the same in every step."""
    model = block_mlp()
    options = {"MeZOSVRG": {"anchor_lr": 0.03}, "SparseMeZO": {"sparsity": 0.25}, "LeZO": {"drop": 0.5}}
    opt = METHODS[method](model, lr=0.03, seed=SEED, directions=4, **options.get(method, {}))
    losses = [take_step(opt, lambda: real_loss(model, 0)).item() for _ in range(60)]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5}, {"drop": 0.5}, {"execution_device": "cpu"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_default_device_is_nobodys(method: str, options: dict[str, Any]) -> None:
    """torch.set_default_device is for the user's tensors; ours are where the weights are, or on the host."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 5, generator=generator), torch.arange(8) % 3
    ends = []
    for default in ("cpu", "meta"):
        model = block_mlp()
        with torch.device(default):
            opt = METHODS[method](model, lr=LR, eps=EPS, **options)
            closure = lambda model=model: torch.nn.functional.cross_entropy(model(x), y)  # noqa: E731
            seen = [float(take_step(opt, closure)) for _ in range(3)]
        ends.append((seen, snapshot(model)))
    assert ends[0][0] == ends[1][0]
    assert_same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("active", [None, [1]])
def test_the_default_device_is_not_a_gpu_tables(active: list[int] | None) -> None:
    weights = [torch.ones(4096), torch.ones(8192)]
    entries = [Entry(w, w, i, 0, 0) for i, w in enumerate(weights)]
    ends = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            group = GpuTable(entries).groups[0]
            work = group.work(active)
        assert work is not None
        ends.append((group.rows.tolist(), work.ids.tolist(), work.first_chunk.tolist(), work.programs))
    assert ends[0] == ends[1]


def test_a_subclass_finds_the_run_while_groups_are_added() -> None:
    """PyTorch adds the first groups within `__init__`."""
    seen = []

    class Logged(zo.MeZO):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            seen.append((self.seed, self.directions, self.step_count, self.drop))
            super().add_param_group(param_group)

    Logged(block_mlp(depth=2, width=4), lr=1e-3, seed=5, directions=2)
    assert seen == [(5, 2, 0, 0.0)]
