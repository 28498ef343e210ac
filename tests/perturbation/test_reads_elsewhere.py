"""Perturbation in the forward is right in every step, or raises before a wrong one, whoever reads weights elsewhere."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from inside import evaluation_of, watch_the_next, watched_steps, watches
from outright import bits, losses_outright
from scripted import assert_same, snapshot
from tolerances import IN_TURN
from torch import Tensor, nn
from torch.nn import functional

import zo_kernels as zo
from zo_kernels.perturbation.reads.seals import Seals
from zo_kernels.perturbation.reads.watch import Watch

EPS, SEED, STEPS = 1e-2, 3, 13
Model = Any


class Tasks(nn.Module):
    """Two layers and a head for each task, which it calls, or does something else with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
        self.old = self.second.weight.detach()[1:] if self.aliased else None
        self.kept: list[Tensor] = []
        self.keeps = False
        self.second.register_forward_pre_hook(self.keep)

    aliased = False

    def keep(self, second: nn.Module, _: Any) -> None:
        self.kept = [second.weight.t()] if self.keeps else []

    def forward(self, x: Tensor, task: int, then: Callable[[Model, Tensor], Tensor] | None = None) -> Tensor:
        h = torch.tanh(self.second(self.first(x)))
        return self.heads[task](h) if then is None else then(self, h)


class Aliased(Tasks):
    aliased = True


def instead(m: Model, h: Tensor) -> Tensor:
    return functional.linear(h, m.heads[3].weight, m.heads[3].bias)


def besides(m: Model, h: Tensor) -> Tensor:
    """The same modules run."""
    return m.heads[3](h @ m.second.weight.T)


def by_view(m: Model, h: Tensor) -> Tensor:
    return m.heads[3](h @ m.second.weight.data.t()[:, :6])


def chosen(m: Model, h: Tensor) -> Tensor:
    """No NaN would come through."""
    return m.heads[3](h) + m.heads[2].weight.argmax() + torch.where(m.first.weight[0, 0] > 0, 1.0, 2.0)


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 10).view(2, 5)


def loss_of(m: Model, task: int, then: Callable[[Model, Tensor], Tensor] | None = None) -> Tensor:
    return m(inputs(), task, then).square().mean()


REACHED = {"instead": instead, "besides": besides, "by a view": by_view, "chosen": chosen}
WHEN: dict[str, Callable[[int], bool]] = {
    **{f"every {n}.": lambda step, n=n: step % n == n - 1 for n in (2, 3, 4, 5, 7, 8)},
    **{f"from {n} on": lambda step, n=n: step >= n for n in (1, 6)},
    "once": lambda step: step == 11,
    "at random": lambda step: random.Random(step).random() < 0.3,
}


def made(kind: type[nn.Module] = Tasks) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def optimizer(model: nn.Module, **options: Any) -> zo.MeZO:
    return zo.MeZO(model, lr=0.0, eps=EPS, seed=SEED, **{"perturb": "in_forward", **options})


def check_step(opt: zo.ZeroOrderOptimizer, twin: nn.Module, loss: Callable[[Any], Any], step: int) -> None:
    plus, minus = losses_outright(twin, lambda: loss(twin), seed=SEED, step=step, eps=EPS)
    assert opt.projected_gradients == [(plus - minus) / (2 * EPS)], step


@pytest.mark.parametrize("when, streamed", [*((when, False) for when in WHEN), ("every 4.", True), ("at random", True)])
def test_right_in_every_step(when: str, streamed: bool) -> None:
    """Whatever task the other steps have, and whether other modules run."""
    for read in REACHED.values():
        model, twin = made(), made()
        opt = optimizer(model, **({"execution_device": "cpu", "perturb": "auto"} if streamed else {}))
        for step in range(STEPS):

            def loss(m: Model, step: int = step, read: Any = read) -> Tensor:
                return loss_of(m, 3, read) if WHEN[when](step) else loss_of(m, step % 4)

            opt.step(partial(loss, model))
            check_step(opt, twin, loss, step)
        assert_same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_right_in_every_evaluation(nth: int) -> None:
    """Of which one alone reads elsewhere, from the second step on."""
    for read in REACHED.values():
        model, twin = made(), made()
        opt = optimizer(model, directions=2)

        def closure(model: Model = model, opt: Any = opt, read: Any = read) -> Tensor:
            reads = opt.step_count > 0 and evaluation_of(opt) == nth
            return loss_of(model, 3, read if reads else None)

        for step in range(3):
            opt.step(closure)
            without, every = (
                losses_outright(twin, partial(loss_of, twin, 3, then), seed=SEED, step=step, eps=EPS, directions=2)
                for then in (None, read)
            )
            expected = [every[i] if step and i + 1 == nth else loss for i, loss in enumerate(without)]
            assert opt.projected_gradients == [(expected[i] - expected[i + 1]) / (2 * EPS) for i in (0, 2)]


def test_svrg_in_turn() -> None:
    """At the anchor, too."""
    seen = []
    for perturb in ("in_place", "in_forward"):
        model = made()
        opt = zo.MeZOSVRG(model, lr=0.01, eps=EPS, seed=SEED, anchor_every=5, perturb=perturb)
        for step in range(STEPS):
            then = besides if step % 5 in (0, 3) and step else None
            opt.step(lambda m=model, t=then: loss_of(m, 3, t), lambda m=model, t=then: loss_of(m, 2, t))
        seen.append(snapshot(model))
    for name, in_place in seen[0].items():
        torch.testing.assert_close(in_place, seen[1][name], rtol=0.0, atol=IN_TURN)


def penalized(m: Model) -> Tensor:
    return loss_of(m, 3) + m.heads[3].weight.square().sum()


def by_old_view(m: Model) -> Tensor:
    return loss_of(m, 3, lambda m, h: m.heads[3](h) + m.old.sum())


def by_kept_view(m: Model) -> Tensor:
    m.keeps = True
    try:
        return loss_of(m, 3, lambda m, h: m.heads[3](h @ m.kept[0]))
    finally:
        m.keeps, m.kept = False, []


def by_gradient(m: Model) -> Tensor:
    with torch.enable_grad():
        x = inputs().requires_grad_()
        return torch.autograd.grad(m(x, 3).square().mean(), x)[0].square().sum()


UNREACHED: dict[str, tuple[type[nn.Module], Callable[[Any], Any], str]] = {
    "penalty": (Tasks, penalized, "reads heads.3.weight where no module runs"),
    "old view": (Aliased, by_old_view, "reads second.weight through a view that was made before"),
    "kept view": (Tasks, by_kept_view, "after the forward of their module"),
    "gradient": (Tasks, by_gradient, "after the forward of their module"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", UNREACHED)
def test_an_error_before_a_wrong_step(case: str, streamed: bool) -> None:
    """The same modules run in the same order as before."""
    kind, wrong, message = UNREACHED[case]
    for begin in (1, 4):
        model, twin = made(kind), made(kind)
        opt = optimizer(model, **({"execution_device": "cpu", "perturb": "auto"} if streamed else {}))
        for step in range(begin):
            opt.step(partial(loss_of, model, 3))
            check_step(opt, twin, lambda m: loss_of(m, 3), step)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"closure: .*{message}"):
                opt.step(partial(wrong, model))
        assert opt.step_count == begin
        assert_same(snapshot(model), snapshot(twin))
        opt.step(partial(loss_of, model, 3))
        check_step(opt, twin, lambda m: loss_of(m, 3), begin)


def unnoticed(m: Model, h: Tensor) -> Tensor:
    """As an extension does, which asks nobody."""
    with torch._C.DisableTorchFunctionSubclass():
        return m.heads[3](h) + m.first.weight.sum()


@pytest.mark.parametrize("strict", [False, True])
def test_a_wrong_step_is_said(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    """Of a read that seals do not notice, in a step that is watched all the same; it is right from then on."""
    watched_steps(monkeypatch, lambda step: step == 7)
    model, twin = made(), made()
    opt = optimizer(model, strict=strict)
    said = r"reads first\.weight outside .* up to 7 steps before this one"
    for step in range(10):

        def loss(m: Model, step: int = step) -> Tensor:
            return loss_of(m, 3, unnoticed if step >= 3 else None)

        if step == 7 and strict:
            with pytest.raises(ValueError, match=said):
                opt.step(lambda loss=loss: loss(model))
            return
        with pytest.warns(UserWarning, match=said) if step == 7 else warnings.catch_warnings():
            warnings.simplefilter("error" if step != 7 else "always")
            opt.step(lambda loss=loss: loss(model))
        if step < 3 or step >= 7:
            check_step(opt, twin, loss, step)


def test_a_step_half_of_which_was_not_watched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    watched_steps(monkeypatch, lambda step: False)
    model, twin = made(), made()
    opt = optimizer(model)
    opt.step(lambda: loss_of(model, 3))

    def first_then_second() -> Tensor:
        value = loss_of(model, 3, unnoticed)
        watch_the_next(opt)
        return value

    with pytest.warns(UserWarning, match="up to 1 steps"), pytest.raises(ValueError, match="the step is skipped"):
        opt.step(first_then_second)
    assert opt.refused_steps == 1
    opt.step(lambda: loss_of(model, 3, unnoticed))
    check_step(opt, twin, lambda m: loss_of(m, 3, unnoticed), 2)


def calls_of(opt: zo.ZeroOrderOptimizer, loss: Callable[[], Tensor]) -> int:
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss()

    opt.step(closure)
    return calls


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    """Evaluations that were, of steps that are not drawn."""
    watched_steps(monkeypatch, lambda step: False)
    return watches(monkeypatch)


def asking(m: Model, h: Tensor) -> Tensor:
    """About weights, without reading them."""
    w = m.first.weight
    assert isinstance(w, nn.Parameter) and w.requires_grad and w.is_leaf and len(w) == w.size(0) == 6
    assert (w.shape, w.dtype, w.device, w.dim(), w.numel()) == ((6, 5), h.dtype, h.device, 2, 30)
    assert w.is_floating_point() and w.is_contiguous() and w.stride() == (5, 1) and hash(w) == id(w)
    assert h.type_as(w) is h and h.to(w) is h and torch.zeros_like(w).sum() == w.new_zeros(2).sum() == 0
    return m.heads[3](h)


def test_nothing_is_done_twice_without_a_cause(watched: list[Watch]) -> None:
    model = made()
    opt = optimizer(model)
    assert calls_of(opt, lambda: loss_of(model, 3)) == 2 and len(watched) == 1
    for _ in range(5):
        assert calls_of(opt, lambda: loss_of(model, 3, asking)) == 2
    assert calls_of(opt, lambda: loss_of(model, 2)) == 3  # another head
    assert calls_of(opt, lambda: loss_of(model, 2)) == 2
    assert len(watched) <= 3
    model.eval()  # or other paths may be taken
    assert calls_of(opt, lambda: loss_of(model, 3)) == 3


def test_what_points_to_reads_and_means_nothing_costs_ever_less(watched: list[Watch]) -> None:
    """Modules in ever other orders, and weights that are looked at where none runs."""
    layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(12))

    def ever_other(step: int) -> Tensor:
        x = inputs()
        for i in random.Random(step).sample(range(12), 4):
            x = layers[i](x)
        return x.square().mean()

    opt = optimizer(layers)
    assert sum(calls_of(opt, lambda s=step: ever_other(s)) for step in range(60)) < 120 + 8
    model = made()
    opt = optimizer(model)
    assert (
        sum(calls_of(opt, lambda: loss_of(model, 3) + 0 * len(bits(model.first.weight))) for _ in range(60)) < 120 + 8
    )
    assert calls_of(opt, lambda: loss_of(model, 3)) == 2


def test_other_tensors_of_the_same_memory(watched: list[Watch]) -> None:
    """As long as there are any, nobody knows who reads what."""
    model = made()
    opt = optimizer(model)
    opt.step(lambda: loss_of(model, 3))
    holds = (model.state_dict, lambda: model.heads[1].bias.detach()[1:], lambda: model.first.weight.data.numpy())
    for hold in holds:
        held = hold()
        watched.clear()
        for _ in range(2):
            assert calls_of(opt, lambda: loss_of(model, 3)) == 2
        assert len(watched) == 4
        del held
        watched.clear()
        opt.step(lambda: loss_of(model, 3))
        assert not watched


def test_copies_of_closed_weights_are_ordinary() -> None:
    model = made()
    seals = Seals(list(model.parameters()))
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        with seals.of(None):
            assert nn.Parameter not in {type(p) for p in model.parameters()}
            assert not seals.broken
            other = copied(model)
            assert seals.broken
        assert {type(p) for p in (*model.parameters(), *other.parameters())} == {nn.Parameter}
