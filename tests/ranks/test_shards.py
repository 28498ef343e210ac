"""Sharded models: whoever holds which elements, the bits of the noise and of the updates are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from models import block_mlp
from pool import Pool
from scenarios import same
from sharded import SHAPE
from tolerances import reordered

import zo_kernels as zo

LAYOUTS = [("fsdp", 2), ("fsdp", 4), ("hybrid", 4), ("tensor", 2), ("both", 4)]


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_shards_are_the_elements_that_pytorch_puts_there(ranks: Pool, layout: str, size: int) -> None:
    assert all(ranks.run(size, sharded.elements, layout=layout))


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_noise_is_that_of_the_whole(ranks: Pool, layout: str, size: int) -> None:
    (expected,) = ranks.run(1, sharded.noise, layout="plain")
    assert len(expected["head.weight"].unique()) == 18
    for got in ranks.run(size, sharded.noise, layout=layout):
        assert same(got, expected)


METHODS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "MeZO": ("MeZO", torch.float32, {"weight_decay": 0.1, "directions": 2}),
    "MeZO, bf16": ("MeZO", torch.bfloat16, {}),
    "SparseMeZO, bf16, signs": ("SparseMeZO", torch.bfloat16, {"sparsity": 0.3, "distribution": "rademacher"}),
    "SparseMeZO": ("SparseMeZO", torch.float32, {"sparsity": 0.6}),
    "SparseMeZO, fp16": ("SparseMeZO", torch.float16, {"sparsity": 0.3, "mask": "kept"}),
    "LeZO, signs": ("LeZO", torch.float32, {"distribution": "rademacher"}),
    "MeZOSVRG": ("MeZOSVRG", torch.float32, {"sparsity": 0.5, "drop": 0.5}),
}


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_one_process(ranks: Pool, method: str, layout: str, size: int) -> None:
    """Given equal losses. The trajectory is the same to the byte, so that one process replays what many have done."""
    name, dtype, options = METHODS[method]
    arguments = {"method": name, "dtype": dtype, **options}
    (one,) = ranks.run(1, sharded.moved, layout="plain", **arguments)
    for rank in ranks.run(size, sharded.moved, layout=layout, **arguments):
        assert rank["sharded"]
        assert same(rank["weights"], one["weights"])
        assert rank["trajectory"] == one["trajectory"]
    model = block_mlp(dtype=dtype, **SHAPE)
    zo.replay(model, zo.Trajectory.from_bytes(one["trajectory"]))
    assert same(sharded.whole(model), one["weights"])


@pytest.mark.parametrize("after_evaluation", [False, True])
@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("fsdp", 4), ("hybrid", 4)])
def test_training_is_that_of_copies(ranks: Pool, layout: str, size: int, after_evaluation: bool) -> None:
    """Forwards gather the perturbed shards: losses, and so the weights, have the bits of ranks with whole models."""
    copies = ranks.run(size, sharded.trained, layout="plain", steps=5)
    shards = ranks.run(size, sharded.trained, layout=layout, steps=5, after_evaluation=after_evaluation)
    for rank in shards:
        assert rank["losses"] == copies[0]["losses"]
        assert same(rank["weights"], copies[0]["weights"])
        assert rank["evaluated"] == copies[0]["evaluated"]


@pytest.mark.parametrize(("layout", "size", "parts"), [("tensor", 2, 1), ("both", 4, 2)])
def test_tensor_parallel_models_train(ranks: Pool, layout: str, size: int, parts: int) -> None:
    """Their forwards add up in another order: the loss is what it should be but for that, and equal on all ranks."""
    whole = ranks.run(parts, sharded.trained, layout="plain", steps=1)[0]
    first, *others = ranks.run(size, sharded.trained, layout=layout, steps=3)
    assert abs(first["losses"][0] - whole["losses"][0]) <= reordered(whole["losses"][0], SHAPE["depth"] * 12)
    for rank in others:
        assert rank["losses"] == first["losses"]
        assert same(rank["weights"], first["weights"])
    assert not same(first["weights"], sharded.whole(block_mlp(**SHAPE)))


@pytest.mark.parametrize("method", ["MeZO", "MeZOSVRG"])
def test_another_number_of_shards_resumes_a_run(ranks: Pool, method: str, tmp_path: Path) -> None:
    """Also one that keeps its masks, as `sharded.resumed` does with MeZO."""
    (whole,) = ranks.run(1, sharded.resumed, layout="plain", path=str(tmp_path / "whole.zo"), method=method, upto=9)
    path = str(tmp_path / "cut.zo")
    ranks.run(4, sharded.resumed, layout="fsdp", path=path, method=method, upto=4)
    ranks.run(2, sharded.resumed, layout="tensor", path=path, method=method, upto=7)
    for rank in ranks.run(4, sharded.resumed, layout="both", path=path, method=method, upto=9):
        assert same(rank["weights"], whole["weights"])


@pytest.mark.parametrize("mask", ["redrawn", "kept"])
@pytest.mark.parametrize("method", ["SparseMeZO", "MeZOSVRG"])
def test_state_of_shards(ranks: Pool, method: str, mask: str) -> None:
    assert all(ranks.run(2, sharded.saved, layout="fsdp", method=method, mask=mask))


def test_masks_in_a_state_are_bits_where_shards_of_them_are_bytes(ranks: Pool) -> None:
    """Other shards than those of rows may end within a byte; then a state has bools, which anybody can share."""
    for layout, size, down in (("plain", 1, (torch.uint8, [6, 2])), ("tensor", 2, (torch.bool, [6, 12]))):
        for masks in ranks.run(size, sharded.masks_of, layout=layout):
            assert masks["blocks.0.up.weight"] == (torch.uint8, [12, 1])
            assert masks["blocks.0.up.bias"] == (torch.bool, [12])
            assert masks["blocks.0.down.weight"] == down


def test_another_number_of_shards_goes_on_with_the_masks_of_a_checkpoint(ranks: Pool, tmp_path: Path) -> None:
    (one,) = ranks.run(1, sharded.checkpointed, path=str(tmp_path / "one"), layout="plain", steps=range(9))
    path = str(tmp_path / "several")
    for size, layout, steps in ((4, "fsdp", range(4)), (2, "tensor", range(4, 7)), (4, "both", range(7, 9))):
        every = ranks.run(size, sharded.checkpointed, path=path, layout=layout, steps=steps)
    assert all(same(rank, one) for rank in every)


def test_what_cannot_be_trained_is_refused(ranks: Pool) -> None:
    for said in ranks.run(2, sharded.refusals):
        assert len(said) == 6
        assert "the weights are sharded" in said[0] and "MixedPrecisionPolicy" in said[0]
        assert "give the module" in said[1]
        assert "the weights are sharded" in said[2] and "use 'batch'" in said[2]
        assert "weight: expected a parameter in shards or copies" in said[3]
        assert "fully_shard (FSDP2)" in said[4]
        assert "ZeRO-3" in said[5] and "fully_shard (FSDP2)" in said[5]
