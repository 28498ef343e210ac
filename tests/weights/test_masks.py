"""Magnitude masks whose thresholds do not separate, or are those of other weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import METHODS, assert_same, percentile, snapshot
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.weights import masks
from zo_kernels.weights.percentiles import magnitude_percentile
from zo_kernels.weights.shards import shard_of

SEED = 3
X = torch.linspace(-1, 1, 4 * 32).reshape(4, 32)


class Adapted(nn.Module):
    """A frozen layer with LoRA's A and B, and a layer with a bias."""

    def __init__(self, b: float | None = 0.0):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.base = nn.Linear(32, 32, bias=False).requires_grad_(False)
        self.a, self.b, self.out = nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False), nn.Linear(32, 16)
        for p in self.parameters():
            nn.init.normal_(p, generator=g)
        if b is not None:
            nn.init.constant_(self.b.weight, b)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.base(x) + self.b(self.a(x))))


def go(opt: zo.ZeroOrderOptimizer, model: nn.Module, steps: int = 1) -> None:
    def loss() -> Tensor:
        return model(X).float().square().mean()

    for _ in range(steps):
        opt.step(loss, loss) if isinstance(opt, zo.MeZOSVRG) else opt.step(loss)


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, float]:
    """The share of each trainable tensor that is not as before."""
    found = {n: (p != before[n]).float().mean().item() for n, p in model.named_parameters()}
    return {n: share for n, share in found.items() if n != "base.weight"}


@contextmanager
def told(*patterns: str) -> Iterator[None]:
    """What is said about sparsity within: these, in this order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught if "sparsity" in str(w.message)]
    assert len(said) == len(patterns), said
    for pattern, message in zip(patterns, said, strict=True):
        assert pattern in message
    assert all(w.filename == __file__ for w in caught), "a warning points to the user's line"


def sparse(model: nn.Module, **options: Any) -> zo.ZeroOrderOptimizer:
    return zo.SparseMeZO(model, **{"lr": 1e-4, "eps": 1e-3, "seed": SEED, **options})


def ties(at: float, n: int, smaller: int, larger: int) -> Tensor:
    return torch.cat([torch.linspace(0.1, 0.2, smaller), torch.full((n,), -at), torch.linspace(5, 6, larger)])


NORMAL = torch.randn(4096, generator=torch.Generator().manual_seed(2))
SEPARATES = {
    "zeros": (torch.zeros(8), 0.75, False),
    "as many zeros as are wanted": (torch.cat([torch.zeros(2), torch.ones(6)]), 0.75, False),
    "fewer zeros than are wanted": (torch.cat([torch.zeros(1), torch.linspace(1, 2, 7)]), 0.75, True),
    "ones": (torch.ones(100), 0.75, False),
    "ones, most of which are to take part": (torch.ones(100), 0.25, False),
    "signs": (torch.tensor([1.0, -1.0] * 50), 0.5, False),
    "twice as many as are wanted": (ties(1.0, 40, 10, 50), 0.75, True),
    "one more": (ties(1.0, 41, 10, 49), 0.75, False),
    "half of those to leave out are left": (ties(1.0, 70, 10, 20), 0.4, True),
    "one less": (ties(1.0, 71, 10, 19), 0.4, False),
    "four, two of them equal": (torch.tensor([1.0, -1.0, 2.0, 3.0]), 0.75, True),
    "four, three of them equal": (torch.tensor([1.0, -1.0, 1.0, 3.0]), 0.75, False),
    "bfloat16": (NORMAL.bfloat16(), 0.75, True),
    "bfloat16, few of them": (NORMAL.bfloat16(), 0.99, True),
    "eight bits": ((NORMAL * 32).round().clamp(-127, 127) / 32, 0.75, True),
    "three values": ((NORMAL * 0.8).round().clamp(-1, 1), 0.75, False),
    "pruned": (NORMAL * (NORMAL.abs() > 0.7), 0.75, False),
}


@pytest.mark.parametrize("case", SEPARATES)
def test_what_separates(case: str) -> None:
    w, sparsity, expected = SEPARATES[case]
    assert magnitude_percentile(shard_of("w", w), sparsity).separates == expected


WHERE: dict[str, dict[str, Any]] = {
    "in place": {"perturb": "in_place"},
    "in the forward": {"perturb": "in_forward"},
    "streamed": {"perturb": "in_forward", "execution_device": "cpu"},
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_dense_and_named_once(method: str, where: str, tmp_path: Path) -> None:
    """In every step, in a replay, and in a run that is gone on with from its file or from a checkpoint."""
    options = {"lr": 1e-4, "sparsity": 0.75, "drop": 0.0, **WHERE[where]}
    model = Adapted()
    start = copy.deepcopy(model)
    with told("1 of 4 tensors, with 24.6 % of the weights, is left dense: their magnitudes do not separate"):
        opt = METHODS[method](model, trajectory=tmp_path / "run.zo", **options)
        for _ in range(6):
            before = snapshot(model)
            go(opt, model)
            shares = moved(model, before)
            assert shares["b.weight"] > 0.9 and 0.15 < shares["a.weight"] < 0.3 and 0.15 < shares["out.weight"] < 0.3
    state, weights = copy.deepcopy(opt.state_dict()), snapshot(model)
    assert [h is None for h in state["zo"]["thresholds"]] == [True, False, True, False, False]  # the first is frozen
    zo.replay(replayed := copy.deepcopy(start), tmp_path / "run.zo")
    assert_same(snapshot(replayed), weights)
    go(opt, model, 2)
    opt = None
    (tmp_path / "copy.zo").write_bytes((tmp_path / "run.zo").read_bytes())
    with told("100 % of b.weight have |θ| <= 0, but only 25 % should take part"):
        again = METHODS[method](start, **options)
    with told():
        again.resume(tmp_path / "copy.zo")
    assert_same(snapshot(start), snapshot(model))
    for model_first in (True, False):
        other = Adapted(None)
        with told("b.weight was dense in the run that is being continued"):
            from_state = METHODS[method](other, **options)
            if model_first:
                other.load_state_dict(weights)
            from_state.load_state_dict(copy.deepcopy(state))
            other.load_state_dict(weights)
            go(from_state, other, 2)
        assert_same(snapshot(other), snapshot(model))


def test_a_recorded_threshold_stays_whatever_it_is() -> None:
    """Of a run that masked zeros: they stay where they are."""
    model = Adapted()
    with told("100 % of b.weight have |θ| <= 0"):
        opt = sparse(model, lr=0.0)
    go(opt, model)
    state = opt.state_dict()
    state["zo"]["thresholds"][2] = 0.0
    nn.init.normal_(model.b.weight)
    again = sparse(model)
    with told("in b.weight 0 % have |θ| <= 0"):
        again.load_state_dict(state)
        before = snapshot(model)
        go(again, model)
    assert moved(model, before)["b.weight"] == 0.0 and again.state_dict()["zo"]["thresholds"][2] == 0.0


def test_whole_tensors_too_small_to_leave_any_out_are_dense() -> None:
    model = nn.Sequential(nn.Linear(32, 1), nn.Linear(1, 3))
    with told():
        opt = sparse(model, sparsity=0.3)
    assert [h is None for h in opt.state_dict()["zo"]["thresholds"]] == [False, True, True, True]


def test_strict_doubts_and_dense_tensors() -> None:
    model = Adapted()
    named = dict(model.named_parameters())
    b = {"params": [("b.weight", named.pop("b.weight"))], "sparsity": 0.0}
    with told():
        sparse([{"params": list(named.items())}, b], strict=True)
    with pytest.raises(ValueError, match=r"sparsity: 1 of 4 tensors, .* 100 % of b\.weight have .* only 25 % should"):
        sparse(model, strict=True)
    big = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    nn.init.zeros_(big[1].bias)  # as of every new classifier
    with told("100 % of 1.bias have |θ| <= 0"):
        sparse(big, strict=True)


# Before the first step. Each leaves weights that an optimizer made now would see.
def loaded(model: nn.Module) -> None:
    model.load_state_dict({n: 10 * p for n, p in model.state_dict().items()})


def written(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(10)  # which no version counter sees


def replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = 10 * p.data


def made_zero(model: nn.Module) -> None:
    nn.init.zeros_(model.a.weight)


def made_random(model: nn.Module) -> None:
    nn.init.normal_(model.b.weight)


def small_ones_halved(model: nn.Module) -> None:
    """As many as before are below the thresholds, which are no percentiles any more."""
    for p in model.parameters():
        p.data[p.abs() <= percentile(p.detach(), 0.75)] *= 0.5


def widened(model: nn.Module) -> None:
    model.bfloat16().float()


@pytest.mark.parametrize("method", ["SparseMeZO", "MeZOSVRG"])
@pytest.mark.parametrize("change", [loaded, written, replaced, made_zero, made_random, small_ones_halved, widened])
def test_weights_loaded_before_the_first_step(change: Callable[[nn.Module], None], method: str) -> None:
    ends = []
    for late in (False, True):
        model = Adapted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not late:
                torch.manual_seed(0)
                change(model)
            mask = "kept" if method == "SparseMeZO" else "redrawn"
            opt = METHODS[method](model, lr=1e-4, sparsity=0.75, mask=mask, perturb="in_forward")
            if late:
                torch.manual_seed(0)
                change(model)
                if method == "MeZOSVRG":
                    opt.load_state_dict(opt.state_dict())  # of no step, so of no run
            go(opt, model, 2)
        ends.append((snapshot(model), opt.state_dict()))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1]["zo"]["thresholds"] == ends[1][1]["zo"]["thresholds"]
    kept = [{p: str(entry) for p, entry in state["state"].items() if entry} for _, state in ends]
    assert kept[0] == kept[1]  # the masks, or the anchors


def test_sparsity_counts_until_the_first_step() -> None:
    model = Adapted(None)
    opt = sparse(model)
    opt.param_groups[0]["sparsity"] = 0.5
    before = snapshot(model)
    go(opt, model)
    assert 0.4 < moved(model, before)["a.weight"] <= 0.5
    opt.param_groups[0]["sparsity"] = 0.25
    with told("param_groups[0].sparsity: it was changed from 0.5 to 0.25, which has no effect"):
        go(opt, model, 2)


@pytest.mark.filterwarnings("ignore:something other than the optimizer")
@pytest.mark.parametrize("factor, said", [(10.0, True), (0.1, True), (1.2, False)])
@pytest.mark.parametrize("strict", [False, True])
def test_weights_loaded_in_the_middle(factor: float, said: bool, strict: bool) -> None:
    model = Adapted(None)
    opt = sparse(model, strict=strict)
    go(opt, model, 3)
    model.load_state_dict({n: factor * p for n, p in model.state_dict().items()})
    before, thresholds = snapshot(model), opt.state_dict()["zo"]["thresholds"]
    if said and strict:
        for _ in range(3):
            with pytest.raises(ValueError, match="of the weights of masked tensors take part instead of 25 %"):
                go(opt, model)
        assert_same(snapshot(model), before)
        assert opt.step_count == 3
        return
    with told(*["Something other than the optimizer changed the weights"] * said):
        go(opt, model, 3)
    assert opt.state_dict()["zo"]["thresholds"] == thresholds


@pytest.mark.parametrize(
    "lr, mask, expected", [(1e-9, "redrawn", [3, 8, 16]), (0.3, "redrawn", [3]), (0.3, "kept", [])]
)
def test_shares_are_looked_at_now_and_then(
    lr: float, mask: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself moves weights past their thresholds: that is the method, so it is said once and no error. Masks
    that are kept have the shares that they began with.
    """
    looks, check = [], masks.Thresholds._check_shares
    monkeypatch.setattr(masks.Thresholds, "_check_shares", lambda *a: looks.append(opt.step_count) or check(*a))
    monkeypatch.setattr(masks, "_EARLY_CHECK", 3)
    monkeypatch.setattr(masks, "_CHECK_EVERY", 8)
    model = Adapted(None)
    opt = sparse(model, lr=lr, mask=mask, strict=True)
    with told(*["Weights that grow past their threshold no longer take part"] * (expected == [3])):
        go(opt, model, 18)
    assert looks == expected


def test_a_changing_hook_is_not_looked_at_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looks = Adapted(None), []
    opt = sparse(model)
    go(opt, model)
    monkeypatch.setattr(masks.Thresholds, "_check_shares", lambda *a: looks.append(opt.step_count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            with torch.no_grad():
                model.a.weight.clamp_(-1, 1)
            go(opt, model)
    assert looks == [1, 2, 4, 8, 16]


def test_a_frozen_tensor_has_its_threshold_after_resuming(tmp_path: Path) -> None:
    """Whatever it was frozen for: those of the run are its own, from any of its setups."""
    ends = []
    for resumed in (False, True):
        model = Adapted(None)
        start = copy.deepcopy(model)
        path = tmp_path / f"{resumed}.zo"
        opt = sparse(model, trajectory=path, lr=3e-2)
        go(opt, model, 3)
        model.a.weight.requires_grad_(False)
        go(opt, model, 3)
        if resumed:
            opt = None
            model = start
            opt = sparse(model, lr=3e-2)
            opt.resume(path)
        model.a.weight.requires_grad_(True)
        go(opt, model, 2)
        ends.append(snapshot(model))
    assert_same(*ends)


def test_resuming_with_another_sparsity_is_told(tmp_path: Path) -> None:
    model = Adapted(None)
    start = copy.deepcopy(model)
    go(sparse(model, trajectory=tmp_path / "run.zo"), model, 2)
    for sparsity in (0.5, 0.0):
        again = sparse(other := copy.deepcopy(start), sparsity=sparsity)
        (tmp_path / "copy.zo").write_bytes((tmp_path / "run.zo").read_bytes())
        with told("resume: the run had other thresholds in 4 of 4 tensors"):
            again.resume(tmp_path / "copy.zo")
        before = snapshot(other)
        go(again, other)
        assert moved(other, before)["a.weight"] <= 0.25
        del again  # and with it the file's lock


DROPS: dict[str, tuple[Callable[[nn.Module], list[nn.Module]], float, str | None]] = {
    "none of one": (lambda m: [m.a], 0.75, "drop: 0.75 of 1 blocks rounds to none"),
    "none of three": (lambda m: [m.a, m.b, m.out], 0.1, "drop: 0.1 of 3 blocks rounds to none"),
    "frozen blocks": (lambda m: [m.base, nn.Linear(2, 2)], 0.5, "none of the 2 blocks has a trained parameter"),
    "all that is trained": (lambda m: [m.a, m.b, m.out, m.base], 0.75, "but only 3 have trained parameters, so"),
    "some": (lambda m: [m.a, m.b, m.out], 0.5, None),
    "some, but for a head": (lambda m: [m.a, m.b], 0.5, None),
}


@pytest.mark.parametrize("case", DROPS)
def test_drops_that_do_nothing(case: str) -> None:
    blocks, drop, said = DROPS[case]
    model = Adapted(None)
    for strict in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if said and strict:
                with pytest.raises(ValueError, match=said):
                    zo.LeZO(model, lr=1e-3, drop=drop, blocks=blocks(model), strict=True)
            else:
                zo.LeZO(model, lr=1e-3, drop=drop, blocks=blocks(model), strict=strict)
        assert [said in str(w.message) for w in caught] == [True] * bool(said and not strict)
