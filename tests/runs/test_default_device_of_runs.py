"""`torch.set_default_device` changes nothing of a run whose model is elsewhere."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from default_device import with_and_without
from models import block_mlp
from scripted import METHODS, assert_same, snapshot, take_step
from torch import Tensor, distributed, nn

import zo_kernels as zo

WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "in place": (torch.float32, {"perturb": "in_place"}),
    "in the forward": (torch.bfloat16, {"perturb": "in_forward"}),
    "streamed": (torch.bfloat16, {"execution_device": "cpu"}),
}


def built(method: str, model: nn.Module, **options: Any) -> zo.ZeroOrderOptimizer:
    own: dict[str, Any] = {"anchor_every": 3, "anchor_lr": 0.02} if method == "MeZOSVRG" else {}
    return METHODS[method](model, lr=0.05, eps=1e-2, weight_decay=0.01, **own, **options)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    weight = next(model.parameters())
    x = torch.linspace(-1, 1, 40, device=weight.device).view(8, 5).to(weight.dtype)
    y = torch.arange(8, device=weight.device) % 3
    return lambda: nn.functional.cross_entropy(model(x).float(), y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run(method: str, way: str, tmp_path: Any) -> None:
    """And its trajectory, its replay, and a run that goes on from its checkpoint."""
    dtype, options = WAYS[way]
    start, path = block_mlp(depth=2, dtype=dtype), tmp_path / "run.zo"
    options = {"sparsity": 0.5, "directions": 2, **options}

    def make() -> tuple[list[Any], Any]:
        model, resumed, replayed = (copy.deepcopy(start) for _ in range(3))
        path.unlink(missing_ok=True)
        opt = built(method, model, trajectory=path, **options)
        losses = [float(take_step(opt, loss_of(model))) for _ in range(4)]
        file = io.BytesIO()
        torch.save([model.state_dict(), opt.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file)
        resumed.load_state_dict(weights)
        resumed_opt = built(method, resumed, seed=5, **options)
        resumed_opt.load_state_dict(state)
        for each, its in ((opt, model), (resumed_opt, resumed)):
            losses += [float(take_step(each, loss_of(its))) for _ in range(3)]
        zo.replay(replayed, zo.Trajectory.load(path))
        return [snapshot(m) for m in (model, resumed, replayed)], (losses, path.read_bytes())

    got, expected = with_and_without(make)
    assert got[1] == expected[1]
    for weights in (*got[0], *expected[0][1:]):
        assert_same(weights, expected[0][0])


def test_ranks(tmp_path: Any) -> None:
    start = block_mlp(depth=2)

    def make() -> tuple[Any, list[float]]:
        model = copy.deepcopy(start)
        opt = zo.MeZO(model, lr=0.05, eps=1e-2, parallel=zo.Parallel("batch", check_every=2))
        losses = [opt.step(loss_of(model)) for _ in range(4)]
        return snapshot(model), [float(loss) for loss in losses]

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        got, expected = with_and_without(make)
    finally:
        distributed.destroy_process_group()
    assert_same(got[0], expected[0])
    assert got[1] == expected[1]
