"""Exact percentile thresholds, and the blocks of transformers models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, Experts, block_mlp, family_loss
from scripted import (
    EPS,
    LR,
    SEED,
    percentile,
    run,
    same_bits,
    snapshot,
)
from tolerances import SIGMAS
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.spec import direction_seed
from zo_kernels.weights import percentiles
from zo_kernels.weights.blocks import block_of_parameters, dropped_blocks, find_blocks
from zo_kernels.weights.percentiles import magnitude_percentile
from zo_kernels.weights.shards import shard_of

FLOATS = st.floats(width=16, allow_nan=False)  # exact in float16 and float32; ties, zeros, subnormals, infinities


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    values=st.lists(FLOATS, min_size=1, max_size=40),
    repeat=st.integers(1, 3),
    sparsity=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chunk=st.sampled_from([1, 3, 1 << 20]),
)
def test_threshold_is_the_exact_percentile(values, repeat, sparsity, dtype, chunk) -> None:
    w = torch.tensor(values * repeat).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(percentiles, "_CHUNK", chunk)
        found = magnitude_percentile(shard_of("w", w), sparsity)
    h = found.h
    assert h == percentile(w, sparsity)
    taking_part = len(w) - math.floor(sparsity * len(w))
    assert (found.size, found.target) == (len(w), taking_part)
    assert found.upto == (w.float().abs() <= h).sum() >= taking_part > (w.float().abs() < h).sum() == found.below


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threshold_of_a_large_tensor(dtype: torch.dtype) -> None:
    w = torch.randn((1 << 20) + 4097, generator=torch.Generator().manual_seed(1)).to(dtype)
    n = w.numel()
    for sparsity in (0.0, 1e-6, 0.5, 0.75, 1 - 1e-6, math.nextafter(1.0, 0.0)):
        expected = w.float().abs().kthvalue(n - math.floor(sparsity * n)).values.item()
        assert magnitude_percentile(shard_of("w", w.view(-1, 1)), sparsity).h == expected
    assert magnitude_percentile(shard_of("w", w[:0]), 0.5).h == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_lezo_finds_the_blocks_of_a_transformer(family: str) -> None:
    pytest.importorskip("transformers")
    build, stacks = FAMILIES[family]
    torch.manual_seed(0)
    model = build(layers=3).eval()
    blocks = find_blocks(model)
    assert len(blocks) == 3 * stacks
    owners = block_of_parameters(blocks)
    assert set(owners.values()) == set(range(3 * stacks))

    opt = zo.LeZO(model, lr=1e-2, eps=EPS, seed=SEED, drop=0.5)
    start, losses = snapshot(model), []
    counts = dict.fromkeys(range(3 * stacks), 0)
    for _ in range(8):
        before = snapshot(model)
        losses.append(opt.step(lambda: family_loss(family, model)).item())
        moved = {n for n, p in model.named_parameters() if not same_bits(p, before[n])}
        dropped = {i for p, i in owners.items() if not same_bits(p, before[name_of(model, p)])}
        dropped = set(range(3 * stacks)) - dropped
        assert len(dropped) == round(0.5 * 3 * stacks)
        assert moved == {n for n, p in model.named_parameters() if owners.get(p) not in dropped}
        for i in dropped:
            counts[i] += 1
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) == 8
    assert all(0 < c < 8 for c in counts.values()), counts
    assert not any(same_bits(start[n], p) for n, p in model.named_parameters())


def name_of(model: nn.Module, parameter: Tensor) -> str:
    return next(n for n, p in model.named_parameters() if p is parameter)


def test_lists_inside_a_block_are_part_of_it() -> None:
    model = Experts(depth=3)
    assert find_blocks(model) == list(model.layers)


def test_plain_lists_are_not_blocks() -> None:
    """Lists of leaves, of one member, or of different classes."""
    model = nn.Module()
    model.leaves = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.one = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    model.mixed = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.ModuleList([nn.Linear(2, 2)])])
    with pytest.raises(ValueError, match=r"drop: found no list of transformer blocks in Module"):
        find_blocks(model)


def test_parameters_that_blocks_share_are_never_dropped() -> None:
    model = block_mlp(depth=4)
    model.blocks[2].up = model.blocks[0].up
    opt = zo.LeZO(model, lr=LR, seed=SEED, drop=0.75)
    for step in range(6):
        before = snapshot(model)
        run(opt, model, 1, first=step)
        assert not same_bits(before["blocks.0.up.weight"], model.blocks[0].up.weight)


def test_blocks_may_be_told() -> None:
    model = block_mlp(depth=4)
    opt = zo.LeZO(model.named_parameters(), lr=LR, seed=SEED, drop=0.5, blocks=[model.embed, model.head])
    kept = {"embed.weight": 0, "head.weight": 0}
    for step in range(12):
        before = snapshot(model)
        run(opt, model, 1, first=step)
        unmoved = {n for n, p in model.named_parameters() if same_bits(p, before[n])}
        assert unmoved in ({"embed.weight", "embed.bias"}, {"head.weight", "head.bias"})
        for n in unmoved & set(kept):
            kept[n] += 1
    assert min(kept.values()) > 0


@pytest.mark.parametrize("n, drop", [(2, 0.5), (4, 0.75), (12, 0.75), (12, 0.1), (32, 0.9), (3, 0.99)])
def test_blocks_are_dropped_uniformly(n: int, drop: float) -> None:
    steps, k = 2000, min(round(drop * n), n - 1)
    counts, pairs = torch.zeros(n), torch.zeros(n, n)
    for step in range(steps):
        dropped = dropped_blocks(n, drop, direction_seed(SEED, step, 2**20 - 1))
        assert len(dropped) == k
        hit = torch.zeros(n)
        hit[list(dropped)] = 1
        counts += hit
        pairs += hit[:, None] * hit
    p = k / n
    assert ((counts / steps - p).abs() < SIGMAS * math.sqrt(p * (1 - p) / steps)).all()
    if n > 2:
        q = p * (k - 1) / (n - 1)  # two given blocks together
        others = pairs[~torch.eye(n, dtype=torch.bool)] / steps
        assert ((others - q).abs() <= SIGMAS * math.sqrt(q * (1 - q) / steps)).all()
