"""Perturbation in the forward of all weights within a module at once, where the buffer has room for them anyway."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import buffer_bytes_of, fails_in_finding_owners, owners_of, tables_in_forward_of
from models import Block, BlockMLP, block_mlp, real_loss
from outright import losses_outright
from scripted import assert_same, snapshot
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.perturbation.owners import Owners
from zo_kernels.perturbation.scratch import bytes_for

EPS, SEED = 1e-2, 3


def optimizer(model: nn.Module) -> zo.MeZO:
    return zo.MeZO(model, lr=0.0, eps=EPS, seed=SEED, perturb="in_forward")


def roomy() -> BlockMLP:
    """Its head needs more memory than all of a block."""
    return block_mlp(depth=2, outputs=50)


def largest(model: nn.Module) -> int:
    return max(bytes_for(list(m.parameters(recurse=False))) for m in model.modules())


def check_losses(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Any],
    steps: int = 7,
    between: Callable[[Any, int], None] = lambda model, step: None,
) -> zo.MeZO:
    """In each step they are those of weights perturbed outright, and nothing else of the model changes.

    Args:
        between: what is done to the model before each step.
    """
    twin, opt, losses = copy.deepcopy(model), optimizer(model), list[float]()
    before = snapshot(model)
    for step in range(steps):
        losses.clear()
        between(model, step)
        between(twin, step)

        def closure(step: int = step) -> Any:
            value = loss(model, step)
            losses.append(float(value))
            return value

        opt.step(closure)
        expected = losses_outright(twin, lambda step=step: loss(twin, step), seed=SEED, step=step, eps=EPS)
        assert losses[-2:] == expected, step
        assert_same(before, snapshot(model))
    return opt


def test_a_block_is_one_pass_and_takes_no_more_memory(passes: list[set[str]]) -> None:
    model = roomy()
    opt = optimizer(model)
    each = [{f"{n}.{own}" for own, _ in m.named_parameters(recurse=False)} for n, m in model.named_modules()]
    by_owner = [names for names in each if names]
    blocks = [{name for name in snapshot(model) if name.startswith(f"blocks.{i}.")} for i in range(2)]
    together = [{"embed.weight", "embed.bias"}, *blocks, {"norm.weight", "norm.bias"}, {"head.weight", "head.bias"}]
    for step in range(9):
        passes.clear()
        opt.step(lambda: real_loss(model, 0))
        *probes, update = passes
        assert update == set(snapshot(model))
        first, second = probes[: -len(together)], probes[-len(together) :]
        assert second == together
        # Where reads are watched, it is known which module's forward may read what.
        assert first == together if step else sorted(map(sorted, first)) == sorted(map(sorted, by_owner))
        assert buffer_bytes_of(opt) == largest(model)


def test_losses_of_blocks_perturbed_together() -> None:
    check_losses(roomy(), lambda model, step: real_loss(model, step))


def by_hand(model: Any, x: Tensor) -> Tensor:
    x = model.embed(x)
    for block in model.blocks:
        x = x + block.down(torch.relu(block.up(block.norm(x))))
    return model.head(model.norm(x)).square().mean()


def test_modules_within_may_run_without_it() -> None:
    """In some steps the closure runs a block, in others the modules within, which nobody has announced."""
    x = torch.linspace(-1, 1, 10).view(2, 5)
    for hand in ((3, 6), (0, 1, 2, 4)):
        check_losses(roomy(), lambda m, s, hand=hand: by_hand(m, x) if s in hand else m(x).square().mean())


def test_a_module_in_the_place_of_another_that_has_its_weights() -> None:
    def replace(model: Any, step: int) -> None:
        if step == 5:  # where nobody looks for reads elsewhere
            old, new = model.blocks[0].up, nn.Linear(1, 1)
            new.weight, new.bias = old.weight, old.bias
            model.blocks[0].up = new

    x = torch.linspace(-1, 1, 10).view(2, 5)
    check_losses(roomy(), lambda m, s: by_hand(m, x), between=replace)


def test_blocks_that_run_later_are_taken_together_once_they_were_seen(passes: list[set[str]]) -> None:
    model = roomy()
    opt = optimizer(model)
    block = {name for name in snapshot(model) if name.startswith("blocks.1.")}
    for step in range(6):
        passes.clear()
        if step < 3:  # the last block is left out
            x = torch.ones(2, 5)
            opt.step(lambda x=x: model.head(model.blocks[0](model.embed(x))).square().mean())
        else:
            opt.step(lambda: real_loss(model, 0))
        assert (block in passes[:-1]) == (step >= 4)  # of which the first evaluation is watched


def test_dropped_blocks_of_a_module_that_would_be_taken_together() -> None:
    """It is not in pieces: there are as many choices of blocks as steps."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(4) for _ in range(6)))
    model = nn.Sequential(blocks, nn.Linear(4, 400))
    assert bytes_for(list(blocks.parameters())) < largest(model)
    opt = zo.LeZO(model, lr=0.01, eps=EPS, seed=SEED, drop=0.5, blocks=list(blocks), perturb="in_forward")
    twin = copy.deepcopy(model)
    in_place = zo.LeZO(twin, lr=0.01, eps=EPS, seed=SEED, drop=0.5, blocks=list(twin[0]), perturb="in_place")
    x = torch.linspace(-1, 1, 8).view(2, 4)
    for step in range(40):
        first = float(opt.step(lambda: model(x).square().mean()))
        assert first == pytest.approx(float(in_place.step(lambda: twin(x).square().mean())), rel=1e-5), step
    owners = 1 + 3 * len(blocks)
    assert tables_in_forward_of(opt) <= owners + len(blocks)  # each by itself while watched, and each block


class Again(nn.Module):
    """Runs within itself."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.inner = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        x = self.inner(x) * self.own
        return self(x, times - 1) + self.inner(x) * self.own if times else x


def test_a_module_that_runs_within_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Again(), nn.Linear(6, 60))
    check_losses(model, lambda m, s: m(torch.ones(2, 5)).square().mean())


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self) -> Any:
        return self.weight[1:]


class Around(nn.Module):
    """Returns what a module within it gives of its memory."""

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        super().__init__()
        self.gives, self.lin, self.wrap = Gives(), nn.Linear(5, 5), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.gives()), self.lin(x)


class Opaque:
    """Of which nobody can tell that it holds a tensor."""

    def __init__(self, held: Tensor):
        self.held = held


def test_outputs_do_not_lie_in_the_buffer_when_it_is_used_again() -> None:
    """Whatever way they take: out of the module around, in whatever they are wrapped, or by a hook of its own."""
    for wrap, unwrap in (
        (lambda t: t, lambda given: given),
        (lambda t: {"it": [t]}, lambda given: given["it"][0]),
        (Opaque, lambda given: given.held),
        (None, None),
    ):
        torch.manual_seed(0)
        model = nn.ModuleDict({"around": Around(wrap or (lambda t: None)), "head": nn.Linear(5, 50)})

        def loss(m: Any, step: int, unwrap: Any = unwrap) -> Tensor:
            kept: list[Tensor] = []
            hook = m["around"].gives.register_forward_hook(lambda module, args, output: kept.append(output))
            given, x = m["around"](torch.ones(5))
            hook.remove()
            y = m["head"](x)  # overwrites the buffer
            return y.square().mean() + (kept[0] if unwrap is None else unwrap(given)).sum()

        check_losses(model, loss)


def test_memory_that_moves_while_the_closure_runs() -> None:
    """Its old address may be anybody's: nothing is read there."""
    model = roomy()
    opt, start = optimizer(model), snapshot(model)
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            if step == 3:
                model.share_memory()
            return real_loss(model, 0)

        if step == 3:
            with pytest.raises(RuntimeError, match="memory was replaced since its table was built"):
                opt.step(closure)
        else:
            opt.step(closure)
        assert_same(start, snapshot(model))


def test_what_never_runs_takes_no_room() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"unused": nn.Linear(50, 50), "blocks": nn.Sequential(Block(4), Block(4))})
    opt = check_losses(model, lambda m, step: m["blocks"](torch.ones(2, 4)).square().mean())
    assert buffer_bytes_of(opt) == largest(model["blocks"]) < largest(model)


def test_a_module_that_has_other_parameters_than_the_optimizer() -> None:
    model = roomy()
    opt = optimizer(model)
    for _ in range(3):
        opt.step(lambda: real_loss(model, 0))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="the module no longer has"):
            opt.step(lambda: real_loss(model, 0))


def test_an_interrupt_while_owners_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = roomy()
    opt = optimizer(model)
    for _ in range(3):  # the next one does not look for reads elsewhere
        opt.step(lambda: real_loss(model, 0))
    old, new = model.blocks[0].up, nn.Linear(1, 1)
    new.weight, new.bias = old.weight, old.bias
    model.blocks[0].up = new
    with monkeypatch.context() as patch:
        fails_in_finding_owners(patch, lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            opt.step(lambda: real_loss(model, 0))
    opt.step(lambda: real_loss(model, 0))
    assert new in owners_of(opt)


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 2)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.experts[which](x) * self.router(x).sum()


def test_what_does_not_run_is_not_perturbed(passes: list[set[str]]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": Chosen(), "head": nn.Linear(5, 80)})

    def loss(m: Any, step: int) -> Tensor:
        return m["head"](m["block"](torch.ones(5), int(step == 6))).square().mean()

    check_losses(model, loss, steps=6)
    passes.clear()
    opt = optimizer(model)
    for step in range(8):
        passes.clear()
        opt.step(lambda step=step: loss(model, step))
        unused = "block.experts.0." if step == 6 else "block.experts.1."
        assert not any(name.startswith(unused) for names in passes[:-1] for name in names)


class Outer(nn.Module):
    """Has weights of its own while those within it run."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.linspace(-1, 1, 200))
        self.block = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.own[:5]


def test_where_the_buffer_is_in_use_already_it_does_not_grow() -> None:
    """The block alone would have room, but not beside the weights of the module around it."""
    torch.manual_seed(0)
    model = nn.Sequential(Outer(), nn.Linear(5, 50))
    one_by_one = bytes_for([model[0].own]) + max(bytes_for(list(model[0].block[i].parameters())) for i in (0, 2))
    together = bytes_for([model[0].own, *model[0].block.parameters()])
    assert bytes_for(list(model[0].block.parameters())) < largest(model) < together
    opt = check_losses(model, lambda m, s: m(torch.ones(2, 5)).square().mean())
    assert buffer_bytes_of(opt) == max(one_by_one, largest(model)) < together


@pytest.mark.parametrize(("shape", "owners", "launches"), [("opt-1.3b", 196, 28), ("opt-13b", 324, 204)])
def test_launches_of_large_models(shape: str, owners: int, launches: int) -> None:
    """In an evaluation, as docs/performance.md has them."""
    pytest.importorskip("transformers")
    from benchmarks.step.shapes import SHAPES, Batch

    model = SHAPES[shape].build(Batch(1, 2), torch.device("meta"), torch.bfloat16).model
    weights = list(model.parameters())
    found = Owners(model, weights, lambda indices: bytes_for([weights[i] for i in indices]))
    found.find()
    found.ran.update(m for m in model.modules() if not isinstance(m, nn.ModuleList))
    assert len(found.owned) == owners

    def count(m: nn.Module, live: frozenset[int]) -> int:
        missing = found.together.get(m, frozenset()) - live
        return bool(missing) + sum(count(child, live | missing) for child in m.children())

    assert count(model, frozenset()) == launches
