"""A closure that writes to the weights: in place it is refused, before it is done where that can be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import BlockMLP, block_mlp, real_loss
from scripted import METHODS, assert_same, snapshot, take_step
from tolerances import step_in_place
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import zo_kernels as zo

# Restored weights, none of which is above 4; where something was written, they are 0.5 times as large.
CLOSE = {"rtol": 0.0, "atol": step_in_place(4.0, 1e-3, [0.0])}


def multiplied(model: BlockMLP) -> None:
    model.head.weight.mul_(0.5)


def its_data(model: BlockMLP) -> None:
    model.head.weight.data.mul_(0.5)


def a_row(model: BlockMLP) -> None:
    model.head.weight[1].zero_()


def to_out(model: BlockMLP) -> None:
    torch.zeros(3, out=model.head.bias)


def many_at_once(model: BlockMLP) -> None:
    torch._foreach_mul_([model.embed.bias, model.head.weight], 0.5)


def loaded(model: BlockMLP) -> None:
    model.load_state_dict(block_mlp(depth=1, seed=1).state_dict())


def a_step_of_sgd(model: BlockMLP) -> None:
    with torch.enable_grad():
        real_loss(model, 3).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def a_step_of_ours(model: BlockMLP) -> None:
    zo.MeZO(model, lr=1e-2, perturb="in_place").step(lambda: real_loss(model, 3))


WRITES = [multiplied, its_data, a_row, to_out, many_at_once, loaded, a_step_of_sgd, a_step_of_ours]
UNCOUNTED = {its_data}  # PyTorch does not count what is done to `data`
UNGUARDED = {a_step_of_ours}  # ... nor show its modes what is done to memory


def writing(model: BlockMLP, write: Callable[[BlockMLP], None], at: int) -> Callable[[], Tensor]:
    calls = iter(range(100))

    def closure() -> Tensor:
        if next(calls) == at:
            write(model)
        return real_loss(model, 0)

    return closure


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("write", sorted(set(WRITES) - UNGUARDED, key=lambda f: f.__name__))
@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO", "MeZOSVRG"])
def test_writes_in_the_first_step_are_not_done(method: str, write: Callable, at: int) -> None:
    model = block_mlp(depth=1)
    opt = METHODS[method](model, lr=1e-2)
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=r"it writes to \S+ \(aten::\S+\) while the weights"):
        take_step(opt, writing(model, write, at))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], **CLOSE)
    assert opt.refused_steps == (write is not loaded)  # PyTorch makes a RuntimeError of its own of it
    take_step(opt, lambda: real_loss(model, 0))


@pytest.mark.parametrize("write", sorted(set(WRITES) - UNCOUNTED, key=lambda f: f.__name__))
@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_later_writes_are_seen(method: str, write: Callable) -> None:
    """What was written is mixed with the perturbation, so that the weights must be loaded; MeZO-SVRG has its anchor."""
    model = block_mlp(depth=1)
    opt = METHODS[method](model, lr=1e-2)
    take_step(opt, lambda: real_loss(model, 0))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"closure: it wrote to .* while the weights were perturbed in place") as error:
        take_step(opt, writing(model, write, 1))
    if method == "MeZOSVRG":
        assert str(error.value).endswith("the step is skipped, the weights are restored")
        assert_same(snapshot(model), before)
    else:
        assert str(error.value).endswith("load the weights again, from a checkpoint or the trajectory")
        with pytest.raises(RuntimeError, match="weights: expected those of a whole step"):
            take_step(opt, lambda: real_loss(model, 0))
        rebuilt = block_mlp(depth=1)
        zo.replay(rebuilt, opt.trajectory, upto=1)
        assert_same(snapshot(rebuilt), before)
        model.load_state_dict(rebuilt.state_dict())
    take_step(opt, lambda: real_loss(model, 0))


def test_an_error_beside_a_write_does_not_hide_it() -> None:
    model = block_mlp(depth=1)
    opt = zo.MeZO(model, lr=1e-2)
    opt.step(lambda: real_loss(model, 0))

    def closure() -> Tensor:
        model.head.weight.mul_(0.5)
        raise KeyError("data")

    with pytest.raises(KeyError):
        opt.step(closure)
    with pytest.raises(RuntimeError, match="weights: expected those of a whole step"):
        opt.step(lambda: real_loss(model, 0))


class Written(nn.Module):
    """Whose forward writes to weights within it, in one of its calls."""

    def __init__(self, write: Callable[[BlockMLP], None], call: int):
        super().__init__()
        self.inner, self.write, self.left = block_mlp(depth=1), write, call

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == -1:
            self.write(self.inner)
        return self.inner(x)


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("write", [multiplied, its_data, a_row, many_at_once, loaded])
@pytest.mark.parametrize("ends", ["taken", "refused", "interrupted", "strict", "outside"])
def test_writes_beside_perturbation_in_the_forward(write: Callable, step: int, ends: str) -> None:
    """Nothing is moved there, so they are done; it is said, and what is recorded gives the weights up to there."""
    if write is its_data and step:
        pytest.skip("PyTorch does not count it")
    model = Written(write, 10**6)
    opt = zo.MeZO(model, lr=1e-2, perturb="in_forward", strict=ends == "strict")

    def closure() -> Tensor:
        loss, done = real_loss(model, 0), model.left < 0
        if ends == "outside" and model.left == 998:
            write(model.inner)
        if done and ends == "interrupted":
            raise KeyError("data")
        return loss * float("nan") if done and ends == "refused" else loss

    for _ in range(step):
        opt.step(closure)
    model.left, before = 1000 if ends == "outside" else 1, snapshot(model)
    error = {"refused": ValueError, "interrupted": KeyError, "strict": ValueError}.get(ends)
    if ends == "outside" and not step:  # where every operation is looked at, such a read is an error
        error = ValueError
    said = pytest.warns(UserWarning, match=f"closure: it wrote to .* in step {step}; ")
    with nullcontext() if ends == "strict" else said, pytest.raises(error) if error else nullcontext():
        opt.step(closure)
    opt.step(lambda: real_loss(model, 9))
    if not step:  # there is nothing to rebuild
        return
    rebuilt = Written(write, 0)
    zo.replay(rebuilt, opt.trajectory, upto=step)
    assert_same(snapshot(rebuilt), before)
    with pytest.raises(ValueError, match=f"upto={step}"):
        zo.replay(Written(write, 0), opt.trajectory)


class Renormalised(nn.Module):
    """As transformers' RWKV: its first forward writes the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 4, max_norm=0.1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x)).square().mean()


def test_embeddings_that_renormalise() -> None:
    x = torch.arange(5)
    model = Renormalised()
    with pytest.raises(ValueError, match=r"it writes to embed\.weight .*embedding_renorm_.*perturb='in_forward'"):
        zo.MeZO(model, lr=1e-2).step(lambda: model(x))
    before = snapshot(model)
    opt = zo.MeZO(model, lr=0.0, perturb="in_forward")
    for _ in range(3):
        opt.step(lambda: model(x))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_what_is_compiled_is_so_from_the_second_step_on(method: str) -> None:
    """A mode of PyTorch's keeps torch.compile from compiling, for ever, what it first sees in it."""
    import torch._dynamo

    model, seen = block_mlp(depth=1), []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(4, 5)
    compiled = torch.compile(lambda: model(x).square().mean(), backend=backend, fullgraph=True)
    opt = METHODS[method](model, lr=1e-2)
    take_step(opt, compiled)
    assert not seen
    take_step(opt, compiled)
    assert len(seen) == 1


def test_the_guard_does_not_stay() -> None:
    """Should an exception from outside leave it on PyTorch's stack of modes, restoring takes it off."""
    model = block_mlp(depth=1)
    opt = zo.MeZO(model, lr=1e-2)

    def closure() -> Tensor:
        _get_current_dispatch_mode_stack()[-1].__enter__()  # once more than it will be left
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert not _get_current_dispatch_mode_stack()
