"""Masks that stay for a whole run: the bits of each weight, and the runs that keep them."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import block_mlp, real_loss
from scripted import EPS, METHODS, SEED, assert_same, clean_masks, heights, snapshot, take_step
from torch import nn

import zo_kernels as zo
from zo_kernels.weights import kept, percentiles
from zo_kernels.weights.shards import Shard, shard_of

LAST = torch.channels_last


@pytest.mark.parametrize("shape", [(5,), (8,), (0,), (0, 4), (4, 5), (3, 8), (2, 3, 5), (16, 7), (4, 3, 2, 2)], ids=str)
def test_bits_are_the_masks_in_any_layout(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In logical order, the lowest bit of a byte first; also of a shard of columns, and in pieces."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layouts = [w, w.mT.contiguous().mT if w.dim() > 1 else w, w.contiguous(memory_format=LAST) if w.dim() == 4 else w]
    shards = [shard_of("w", t) for t in layouts]
    if w.dim() == 2 and len(w):
        shards.append(Shard("w", w, (shape[0], 40), (0, 3)))
    for most, shard in itertools.product((2**16, 3), shards):
        monkeypatch.setattr(percentiles, "_CPU_CHUNK", most)
        rows = (w.abs() <= 0.5).reshape(len(shard.runs), w.numel() // len(shard.runs)).int().tolist()
        stretches = [row[i : i + 8] for row in rows for i in range(0, len(row), 8)]
        expected = [sum(bit << k for k, bit in enumerate(stretch)) for stretch in stretches]
        bits = torch.full((len(expected),), 255, dtype=torch.uint8)
        kept.record(bits, shard, 0.5)
        assert bits.tolist() == expected


WHERE: dict[str, dict[str, Any]] = {
    "in place": {"perturb": "in_place"},
    "in the forward": {"perturb": "in_forward"},
    "streamed": {"perturb": "in_forward", "execution_device": "cpu"},
}
LATE, GONE = "embed.weight", "head.weight"


def step(opt: zo.ZeroOrderOptimizer, model: nn.Module, i: int, first: dict[str, torch.Tensor]) -> None:
    """A step that moves the weights of the masks `first`, and no other. One tensor is trained from the third step on,
    one is frozen in the fifth; before the sixth, tables are built for other memory.
    """
    model.get_parameter(LATE).requires_grad_(i >= 2)
    model.get_parameter(GONE).requires_grad_(i != 4)
    if i == 5:
        for p in model.parameters():
            p.data = p.data.clone()
    before = snapshot(model)
    take_step(opt, lambda: real_loss(model, i), lambda: real_loss(model, 1000))
    for name, p in model.named_parameters():
        assert torch.equal(p != before[name], first[name] & p.requires_grad), (name, i)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", ["SparseMeZO", "MeZOSVRG"])
def test_kept_masks_are_those_of_the_first_step(method: str, where: str, tmp_path: Path) -> None:
    """However far weights move, whatever is frozen meanwhile; in a replay, in a copy, and in a run that is gone on with
    from its file or from a state by an optimizer that would redraw them.
    """
    model = block_mlp(depth=1)
    model.get_parameter(LATE).requires_grad_(False)
    start, options = copy.deepcopy(model), {"lr": 0.2, "eps": EPS, "seed": SEED, "sparsity": 0.75, **WHERE[where]}
    first = clean_masks(snapshot(model), heights(snapshot(model), 0.75))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no share of weights is off
        opt = METHODS[method](model, mask="kept", trajectory=tmp_path / "run.zo", **options)
        for i in range(5):
            step(opt, model, i, first)
    redrawn = clean_masks(snapshot(model), heights(snapshot(start), 0.75))
    assert any(not torch.equal(redrawn[name], first[name]) for name in first)
    zo.replay(replayed := copy.deepcopy(start), tmp_path / "run.zo")
    assert_same(snapshot(replayed), snapshot(model))

    (tmp_path / "copy.zo").write_bytes((tmp_path / "run.zo").read_bytes())
    state, weights = copy.deepcopy(opt.state_dict()), snapshot(model)
    copied, again, from_state = copy.deepcopy((opt, model)), copy.deepcopy(start), copy.deepcopy(start)
    resumed, loaded = (METHODS[method](its, **options) for its in (again, from_state))
    with pytest.warns(UserWarning, match=r"mask kept \(not redrawn\); the run's are taken"):
        resumed.resume(tmp_path / "copy.zo")
    from_state.get_parameter(LATE).requires_grad_(True)
    from_state.get_parameter(GONE).requires_grad_(False)
    from_state.load_state_dict(weights)
    loaded.load_state_dict(state)
    for one, its in ((opt, model), copied, (resumed, again), (loaded, from_state)):
        for i in range(5, 8):
            step(one, its, i, first)
        assert one.mask == "kept"
        assert_same(snapshot(its), snapshot(model))
    with pytest.raises(ValueError, match=r"begins (after step 5, .* does not have the masks|between two anchors)"):
        zo.replay(copy.deepcopy(start), loaded.trajectory)
