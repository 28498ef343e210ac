"""Closures that are not the same when they are captured: a graph of them has not the bits of opt.step, and is refused.

transformers takes another path through attention while a stream is captured. Its models run here; the capture is one in
name alone (`played`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import graphs_here, losses_stay
from models import FAMILIES, block_mlp, captures_without_mask, four_dimensional, real_loss
from played import Graphs, capturing
from scripted import assert_same, snapshot
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.runs import graphed
from zo_kernels.runs.operations import Operations, first_difference

CAUSAL = ("OPT", "Llama", "GPT-2")
TOKENS = torch.arange(2, 18).view(2, 8)
ONES = torch.ones_like(TOKENS)
PADDED = ONES.clone()
PADDED[0, 6:] = 0


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    losses_stay(monkeypatch)
    graphs_here(monkeypatch)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """(is_causal, whether there is a mask) of each call of scaled_dot_product_attention."""
    seen: list[tuple[bool, bool]] = []
    function = nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs["is_causal"], kwargs["attn_mask"] is not None))
        return function(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    return seen


def built(family: str, implementation: str = "sdpa") -> nn.Module:
    pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FAMILIES[family][0](layers=2).eval()
    model.set_attn_implementation(implementation)
    return model


def loss_of(family: str, model: nn.Module, mask: Tensor | None, wide: bool, **options: Any) -> Callable[[], Tensor]:
    labels = torch.tensor([0, 1]) if family == "BERT" else TOKENS

    def closure() -> Tensor:
        masks = four_dimensional(family, mask) if wide and mask is not None else {"attention_mask": mask}
        return model(input_ids=TOKENS, labels=labels, **masks, **options).loss

    return closure


def stepped(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, closure: Callable[[], Tensor], perturb: str, **options: Any
) -> tuple[list[float], zo.MeZO, Graphs | None]:
    """Five steps, by a graph if there are options for it."""
    opt = zo.MeZO(model, lr=0.05, eps=1e-2, perturb=perturb)
    if not options:
        return [float(opt.step(closure)) for _ in range(5)], opt, None
    graphs = Graphs(model)
    graphs_here(monkeypatch, graphs.captured)
    step = opt.graphed(closure, warmup=2, **options)
    return [float(step()) for _ in range(5)], opt, graphs


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in CAUSAL for case in ("no mask", "four dimensions", "eager")]
    + [("BERT", "no mask"), ("BERT", "four dimensions")],
)
def test_the_same_when_captured(
    monkeypatch: pytest.MonkeyPatch, attention: list[tuple[bool, bool]], family: str, case: str, perturb: str
) -> None:
    if case == "no mask" and not captures_without_mask():
        pytest.skip("transformers before 5.18 makes a mask when it is captured, also where it is given none")
    mask = None if case == "no mask" else PADDED
    ends, paths = [], []
    for graph in (False, True):
        model = built(family, "eager" if case == "eager" else "sdpa")
        attention.clear()
        closure = loss_of(family, model, mask, case == "four dimensions")
        seen, opt, graphs = stepped(monkeypatch, model, closure, perturb, **({"same_bits": True} if graph else {}))
        assert graphs is None or graphs.captures == 2
        ends.append((snapshot(model), opt.trajectory.to_bytes(), seen))
        paths.append(set(attention))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert paths[0] == paths[1] and len(paths[0]) == (case != "eager")


REFUSED: dict[str, tuple[str, Tensor | None, dict[str, Any], str]] = {
    "all ones": ("sdpa", ONES, {}, r"masking_utils\.py"),
    "padding": ("sdpa", PADDED, {}, r"masking_utils\.py"),  # the next batch may have none
    "no cache": ("sdpa", None, {"use_cache": False}, r"find_packed_sequence_indices, masking_utils\.py"),
    "eager, all ones": ("eager", ONES, {}, r"_ignore_bidirectional_mask_sdpa, masking_utils\.py"),
}


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize(
    ("family", "case"),
    [(f, c) for f in CAUSAL for c in ("all ones", "padding", "no cache") if (f, c) != ("OPT", "no cache")]
    + [("BERT", c) for c in ("all ones", "padding", "eager, all ones")],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, family: str, case: str, perturb: str) -> None:
    implementation, mask, options, at = REFUSED[case]
    model = built(family, implementation)
    closure = loss_of(family, model, mask, False, **options)
    opt = zo.MeZO(model, lr=0.05, eps=1e-2, perturb=perturb)
    graphs_here(monkeypatch, Graphs(model).captured)
    step = opt.graphed(closure, warmup=2)
    step()
    step()
    before, random = snapshot(model), torch.get_rng_state()
    message = rf"expected a closure that is the same .*, but its operations are others: .*{at}.* a four-dimensional one"
    with pytest.raises(ValueError, match=message):
        step()
    assert_same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert opt.step_count == 2 and len(opt.trajectory) == 2
    plain = built(family, implementation)
    _, other, _ = stepped(monkeypatch, plain, loss_of(family, plain, mask, False, **options), perturb)
    while opt.step_count < 5:  # it goes on as if nothing had been
        opt.step(closure)
    assert_same(snapshot(model), snapshot(plain))
    assert opt.trajectory.to_bytes() == other.trajectory.to_bytes()


@pytest.mark.parametrize("family", [*CAUSAL, "BERT"])
def test_what_a_capture_changes(
    monkeypatch: pytest.MonkeyPatch, attention: list[tuple[bool, bool]], family: str
) -> None:
    """What is refused, and what same_bits=False takes: attention is given a mask where otherwise there is none."""
    model = built(family)
    closure = loss_of(family, model, ONES, False)
    causal = family != "BERT"
    with torch.no_grad():
        closure()
        assert set(attention) == {(causal, False)}
        attention.clear()
        with capturing():
            closure()
    assert set(attention) == {(False, True)}
    attention.clear()
    _, opt, graphs = stepped(monkeypatch, model, closure, "in_place", same_bits=False)
    assert graphs is not None and graphs.captures == 1
    assert set(attention[: 2 * 2 * 2]) == {(causal, False)}  # layers, evaluations, steps
    assert set(attention[2 * 2 * 2 :]) == {(False, True)}
    start = built(family)
    zo.replay(start, opt.trajectory)
    assert_same(snapshot(start), snapshot(model))


def test_random_numbers_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison draws none of them, and dropout that is the same from the same state is no difference."""
    ends = []
    for options in ({}, {"same_bits": True}):
        torch.manual_seed(1)
        model = block_mlp()
        dropped = nn.Dropout(0.5)
        model.blocks[1].register_forward_hook(lambda module, args, output, dropped=dropped: dropped(output))
        closure = lambda model=model: real_loss(model, 0)  # noqa: E731
        opt = zo.MeZO(model, lr=0.05, eps=1e-2)
        graphs = Graphs(model)
        kept = graphs.captured

        def captured(body: Callable[[], Any], kept: Any = kept) -> Any:  # which draws nothing
            with torch.random.fork_rng():
                return kept(body)

        graphs_here(monkeypatch, captured)
        step = opt.graphed(closure, warmup=2, **options) if options else lambda opt=opt, c=closure: opt.step(c)
        ends.append(([float(step()) for _ in range(5)], snapshot(model)))
        assert graphs.captures == (2 if options else 0)
    assert ends[0][0] == ends[1][0]
    assert_same(ends[0][1], ends[1][1])


def test_the_same_operations_with_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = block_mlp(), torch.zeros(())

    def closure() -> Tensor:
        return real_loss(model, 0) + calls.add_(1e-7)

    opt = zo.MeZO(model, lr=0.05, eps=1e-2)
    graphs_here(monkeypatch, Graphs(model).captured)
    step = opt.graphed(closure, warmup=1)
    step()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"its loss is another at the same weights: [\d.]+, captured [\d.]+, .*dropout"
    ):
        step()
    assert_same(snapshot(model), before)
    assert opt.step_count == 1


def test_losses_are_compared_by_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_here(monkeypatch, Graphs(block_mlp()).captured)

    def difference(*values: float) -> str | None:
        """Of a closure that returns these in turn: in an ordinary call, and in what stands for capture and replay."""
        losses = [torch.tensor(value) for value in values]
        return graphed.differs_when_captured(lambda: losses.pop(0), torch.device("cpu"))

    for value in (0.5, float("inf"), float("nan")):
        assert difference(value, value, value) is None
    assert "its loss is another at the same weights: 0.0, captured -0.0" in str(difference(0.0, 0.0, -0.0))


def test_operations() -> None:
    x, y = torch.ones(3, 4), torch.ones(4, 3)

    def of(function: Callable[[], Any]) -> Any:
        with Operations() as operations:
            function()
        return operations.seen

    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor], str]] = [
        (lambda: x + 1, lambda: y.t() * 0 + x, "aten::add.Tensor"),
        (lambda: x.sum(0), lambda: x.sum(1), "aten::sum.dim_IntList"),
        (lambda: y.t().sum(), lambda: x.sum(), "aten::t"),
        (lambda: x.double().sum(), lambda: x.half().sum(), "aten::_to_copy"),
        (lambda: torch.cat([x, x]), lambda: torch.cat([x, x, x]), "aten::cat"),
        (lambda: torch.clamp(x, min=float("nan")), lambda: torch.clamp(x, min=0.0), "aten::clamp"),
    ]
    for one, other, name in pairs:
        assert first_difference(of(one), of(one)) is None
        found = first_difference(of(one), of(other))
        assert found is not None and found[0] is not None and found[0].name == name
        assert "test_graphed_closures.py:" in found[0].at
    longer = first_difference(of(lambda: x + 1), of(lambda: (x + 1) * 2))
    assert longer is not None and longer[0] is None and longer[1] is not None and longer[1].name == "aten::mul.Tensor"
    assert [op.name for op in of(lambda: bool(x.sum() > 1))][-1] == "aten::_local_scalar_dense"


def test_a_loss_that_becomes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block_mlp()
    graphs_here(monkeypatch, Graphs(model).captured)
    opt = zo.MeZO(model, lr=0.05, eps=1e-2)
    shape: list[int] = []
    step = opt.graphed(lambda: real_loss(model, 0).expand(shape), warmup=1)
    step()
    shape.append(3)
    with pytest.raises(ValueError, match=r"expected a scalar loss, got a tensor of shape \(3,\); .*no step was taken"):
        step()
    assert opt.step_count == 1
