"""Ranks take every step together: their weights stay equal, bit for bit, and who leaves is named."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import children
import elastic
import pytest
import scenarios
import torch
from models import block_mlp
from pool import Pool
from scenarios import METHODS, SHAPE, same
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import zo_kernels as zo

OPTIONS: dict[str, dict[str, Any]] = {"batch": {}, "directions": {"directions": 4, "distribution": "rademacher"}}


@pytest.mark.parametrize("split", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_one_two_and_four_ranks_have_equal_bits(ranks: Pool, method: str, split: str) -> None:
    """Each other's, and those of the rank that does all of it alone; and so have their trajectories."""
    options = {"method": method, "split": split, "steps": 100 if method == "MeZO" else 24, **OPTIONS[split]}
    runs = {n: ranks.run(n, scenarios.train, **options) for n in (1, 2, 4)}
    alone = runs[1][0]
    assert not same(alone["weights"], scenarios.weights_of(block_mlp(**SHAPE)))
    for size, run in runs.items():
        for rank in run:
            assert same(rank["weights"], alone["weights"]), size
            assert rank["losses"] == alone["losses"]
            assert rank["trajectory"] == alone["trajectory"]
            assert len(rank["gradients"]) == (4 if split == "directions" else 1 + (method == "FZOO"))
    model = block_mlp(**SHAPE)
    zo.replay(model, zo.Trajectory.from_bytes(alone["trajectory"]))
    assert same(scenarios.weights_of(model), alone["weights"])


@pytest.mark.parametrize("split", OPTIONS)
def test_all_ranks_find_the_rate_of_one(ranks: Pool, split: str) -> None:
    """Bit for bit, over rates that diverge at once."""
    options = {"split": split, "perturb": "in_forward", **OPTIONS[split]}
    (alone,) = ranks.run(1, scenarios.find_lr, **options)
    assert alone["found"].learned and any(len(each.losses) < 5 for each in alone["found"].tried)
    for rank in ranks.run(2, scenarios.find_lr, **options):
        assert rank["same"] and rank["found"].lr == alone["found"].lr and rank["found"].tried == alone["found"].tried


@pytest.mark.parametrize("split", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(ranks: Pool, split: str, dtype: torch.dtype) -> None:
    one, *others = (
        rank["weights"]
        for n in (1, 2)
        for rank in ranks.run(n, scenarios.train, method="MeZO", split=split, steps=10, dtype=dtype, **OPTIONS[split])
    )
    assert all(same(one, other) for other in others)


@pytest.mark.parametrize("split", OPTIONS)
def test_losses_that_stay_on_a_device(ranks: Pool, split: str) -> None:
    """Nobody waits for them; a step that is skipped on one rank is skipped on all, and counted when that is known."""
    (alone,) = ranks.run(1, scenarios.train, method="MeZO", split=split, steps=12, **OPTIONS[split])
    for rank in ranks.run(4, scenarios.train_on_device, event="none", split=split, **OPTIONS[split]):
        assert same(rank["weights"], alone["weights"]) and rank["trajectory"] == alone["trajectory"]
        assert rank["refused"] == 0
    first, *others = ranks.run(4, scenarios.train_on_device, event="nan", split=split, **OPTIONS[split])
    for rank in (first, *others):
        assert rank["refused"] == 1 and rank["steps"] == 12 and not rank["said"]
        assert same(rank["weights"], first["weights"]) and not same(rank["weights"], alone["weights"])


def test_ranks_that_differ_on_a_device_are_told_later(ranks: Pool) -> None:
    """At the latest by the check."""
    for rank in ranks.run(2, scenarios.train_on_device, event="rate", split="batch"):
        assert "before step 4: learning rates: [0.01] on rank 0, [0.5] on rank 1" in rank["said"] and rank["steps"] <= 6


@pytest.mark.parametrize(("split", "directions", "own"), [("batch", 1, 1), ("batch", 3, 3), ("directions", 8, 2)])
def test_a_step_exchanges_a_few_bytes(ranks: Pool, split: str, directions: int, own: int) -> None:
    """One collective a step, of 32 bytes and 16 for each direction of a rank; checks of the weights cost no more. One
    goes before the first, in which the ranks agree on that size.
    """
    for counted in ranks.run(4, scenarios.count_bytes, split=split, directions=directions, steps=5):
        (first, size), *steps = counted["given"]
        assert first == "allgather" and steps == [("allgather", 32 + 16 * own)] * 5
        assert counted["sent"] == size + 5 * (32 + 16 * own)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_rank_with_a_corrupted_weight_is_named(ranks: Pool, rank: int) -> None:
    """By all ranks, at the next check (every fourth step), with the weight."""
    for step, said in ranks.run(4, scenarios.corrupted, rank=rank, steps=5, name="blocks.1.up.weight"):
        assert step == 8
        assert f"equal weights before step 9, got others on rank {rank}, in blocks.1.up.weight;" in said
        assert "resume" in said


def test_of_two_ranks_the_first_is_believed(ranks: Pool) -> None:
    for _, said in ranks.run(2, scenarios.corrupted, rank=1, steps=0, name="head.bias"):
        assert "before step 1, got others on rank 1, in head.bias;" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 8}, "seed: 7 on ranks 0 and 2-3, 8 on rank 1"),
        ({"skip": 1}, "steps taken: 0 on ranks 0 and 2-3, 1 on rank 1"),
    ],
)
def test_options_that_differ_are_named(ranks: Pool, options: dict[str, Any], said: str) -> None:
    assert all(said in told for told in ranks.run(4, scenarios.told_apart, rank=1, **options))


def test_weights_that_one_rank_sets_are_noticed_at_once(ranks: Pool) -> None:
    for step, said in ranks.run(4, scenarios.corrupted, rank=3, steps=5, name="head.bias", by_torch=True):
        assert step == 5
        assert "weights changed from outside: False on ranks 0-2, True on rank 3" in said


@pytest.mark.parametrize(
    ("method", "perturb", "event"),
    [
        *(("MeZO", perturb, event) for perturb in ("in_place", "in_forward") for event in ("nan", "raise")),
        ("FZOO", "in_place", "raise"),
    ],
)
def test_what_goes_wrong_on_one_rank_stops_the_step_on_all(ranks: Pool, method: str, perturb: str, event: str) -> None:
    """Whoever then goes on has equal weights; the trajectory tells it all."""
    first, *others = ranks.run(
        4, scenarios.goes_wrong, method=method, split="batch", failing=2, event=event, perturb=perturb
    )
    every = [first, *others]
    for rank, result in enumerate(every):
        assert same(result["weights"], first["weights"])
        assert same(result["replayed"], first["weights"])
        failed = "finite loss" if event == "nan" else "KeyError: 'lost'"
        told = "got none on rank 2" if event == "nan" else "it raised on rank 2"
        assert (failed if rank == 2 else told) in result["said"]
        assert result["refused"] == (event == "nan")
        assert result["steps"] == (6 if event == "nan" else 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", OPTIONS)
def test_more_or_fewer_ranks_resume_a_run(ranks: Pool, method: str, split: str, tmp_path: Path) -> None:
    """From the trajectory that the first rank wrote, its last bytes lost."""
    options = {"method": method, "split": split, "steps": 0, **OPTIONS[split]}
    whole = ranks.run(2, scenarios.cut_off, path=str(tmp_path / "whole.zo"), upto=14, **options)
    path = tmp_path / "cut.zo"
    ranks.run(4, scenarios.cut_off, path=str(path), upto=9, **options)
    path.write_bytes(path.read_bytes()[:-5])
    ranks.run(2, scenarios.cut_off, path=str(path), upto=12, **options)
    for rank in ranks.run(4, scenarios.cut_off, path=str(path), upto=14, **options):
        assert same(rank["weights"], whole[0]["weights"])
    model = copy.deepcopy(block_mlp(**SHAPE))
    zo.replay(model, path)
    assert same(scenarios.weights_of(model), whole[0]["weights"])


@pytest.mark.parametrize(("path", "error"), [("nowhere.zo", "FileNotFoundError"), (3.5, "TypeError")])
def test_a_file_that_the_first_rank_cannot_read_is_told_to_all(ranks: Pool, path: Any, error: str) -> None:
    assert ranks.run(2, scenarios.resumed_in_vain, path=path) == [error, error]


def test_torchrun_restarts_a_rank_that_was_killed(ranks: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all others. They go on from what the first rank had written, and end with the bits of one rank."""
    # Or else gloo may find the addresses of those that died in the store that torchrun hands on.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    children.context()  # has imported PyTorch, which ranks of the command would import anew
    how = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="restarted", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=1, monitor_interval=0.1, start_method="forkserver",
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        elastic_launch(how, elastic.main)(tmp_path, 12, 7)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (tmp_path / "attempt-1").exists() and not (tmp_path / "attempt-0").exists()
    assert zo.Trajectory.load(tmp_path / "run.zo").steps == 12
    (alone,) = ranks.run(1, scenarios.train, method="MeZO", split="batch", steps=12)
    for rank in range(2):
        assert same(torch.load(tmp_path / f"rank-{rank}.pt"), alone["weights"])


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_models_in_distributed_data_parallel(ranks: Pool, perturb: str) -> None:
    """Of no use without gradients, and no harm."""
    (alone,) = ranks.run(1, scenarios.train, method="MeZO", split="batch", steps=6, perturb=perturb)
    assert all(same(rank, alone["weights"]) for rank in ranks.run(2, scenarios.wrapped, perturb=perturb))


def test_arguments_that_ranks_cannot_use(ranks: Pool) -> None:
    for said in ranks.run(2, scenarios.refused_arguments):
        assert len(said) == 4
        assert "directions: expected a multiple of 2, the ranks that share them, got 3" in said[0]
        assert "'directions' needs perturb='in_forward'" in said[1] and "got in_place" in said[1]
        assert "it needs the module, not its parameters alone" in said[2]
        assert "ranks exchange their losses in every step" in said[3]


def test_without_a_process_group() -> None:
    model = block_mlp(**SHAPE)
    assert zo.MeZO(model, lr=0.1).bytes_sent == 0
    with pytest.raises(ValueError, match=r"parallel: expected a process group .* for 'batch', got none"):
        zo.MeZO(model, lr=0.1, parallel="batch")
    with pytest.raises(ValueError, match="parallel: expected one of 'auto', 'batch', 'directions', 'off', got 'all'"):
        zo.MeZO(model, lr=0.1, parallel="all")
    with pytest.raises(ValueError, match="parallel: check_every: expected an integer at least 0, got -1"):
        zo.Parallel(check_every=-1)
    with pytest.raises(ValueError, match=r"parallel: timeout: expected a finite number in \(0.0, .*got 0.0"):
        zo.Parallel(timeout=0)
