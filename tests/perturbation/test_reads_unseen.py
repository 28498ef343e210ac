"""Reads that no operation of this thread shows: by address, and in other threads; and writes to what begins before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from tolerances import loss_slope, reordered
from torch import Tensor, nn
from torch.nn import functional

import zo_kernels as zo

EPS = 1e-2
READS_BY_ADDRESS: dict[str, Callable[[Tensor], Tensor]] = {
    "a kernel": lambda w: torch.tensor(list((ctypes.c_float * w.numel()).from_address(w.data_ptr()))).view(w.shape),
    "tolist": lambda w: torch.tensor(w.tolist()),
}


class ByAddress(nn.Module):
    """Takes the memory of its normalisation's weight, as kernels of Triton's do, from some call on."""

    def __init__(self, read: Callable[[Tensor], Tensor], after: int):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out, self.read, self.left = nn.LayerNorm(4), nn.Linear(4, 2), read, after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        weight = self.norm.weight if self.left >= 0 else self.read(self.norm.weight)
        return self.out(functional.layer_norm(x, (4,)) * weight).square().mean()


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("read", READS_BY_ADDRESS)
def test_memory_that_is_given_away_is_read(read: str, after: int) -> None:
    x, found = torch.randn(3, 4), []
    for perturb in ("in_place", "in_forward"):
        model = ByAddress(READS_BY_ADDRESS[read], after)
        opt = zo.MeZO(model, lr=0.0, eps=EPS, perturb=perturb)
        found.append([])
        for _ in range(6):
            opt.step(lambda model=model: model(x))
            found[-1] += opt.projected_gradients
    # Weights in place are rounded thrice a step, so that losses are off as if some dozens of sums were reordered.
    off = loss_slope(reordered(float(model(x)), 50), EPS)
    assert found[0] == pytest.approx(found[1], rel=0, abs=off)
    with pytest.raises(ValueError, match=r"it reads norm\.weight where no module runs"):
        opt.step(lambda: model(x) + READS_BY_ADDRESS[read](model.norm.weight).sum())


@pytest.mark.parametrize("elsewhere", [True, False])
def test_modules_that_run_in_another_thread(elsewhere: bool) -> None:
    """Nobody can watch what is done there: an error, if weights are used outside of their module."""

    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            last = functional.linear(x, self[1].weight, self[1].bias) if elsewhere else self[1](x)
            return self[0](x).square().mean() + last.mean()

    torch.manual_seed(0)
    model, x = Model(nn.Linear(4, 2), nn.Linear(4, 2)), torch.randn(3, 4)
    opt = zo.MeZO(model, lr=0.0, perturb="in_forward")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="thread") if elsewhere else nullcontext():
        for _ in range(3):
            opt.step(lambda: pool.submit(torch.no_grad()(model), x).result())


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_a_write_that_begins_before_a_weight(perturb: str) -> None:
    """Of one buffer that many weights lie in."""
    flat = torch.randn(4 + 8)
    model, x = nn.Linear(4, 2, bias=False), torch.randn(3, 4)
    model.weight.data = flat[4:].view(2, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            flat.mul_(0.5)
            return self.inner(x).square().mean()

    whole = Model()
    opt = zo.MeZO(whole, lr=0.0, perturb=perturb)
    if perturb == "in_place":
        with pytest.raises(ValueError, match=r"it writes to inner\.weight \(aten::mul_\)"):
            opt.step(lambda: whole(x))
    else:  # it is read so, too
        said = pytest.warns(UserWarning, match=r"it wrote to inner\.weight in step 0")
        with said, pytest.raises(ValueError, match=r"reads inner\.weight through a view that was made before"):
            opt.step(lambda: whole(x))
