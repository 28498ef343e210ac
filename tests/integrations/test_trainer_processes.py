"""Several processes, as torchrun starts them, take the steps that one would."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import children
import models
import pytest
import torch
from tiny_trainer import arguments, assert_same, losses, made, seeded, tokens, weights

import zo_kernels as zo
from zo_kernels.integrations.transformers import ZOTrainer

RUNS: dict[str, dict[str, Any]] = {
    "accuracy": {"objective": "accuracy", "eps": 1e-1},
    "mezo-svrg": {"method": "mezo-svrg", "anchor_every": 2, "anchor_examples": 4},
    "directions": {"parallel": "directions", "directions": 2, "perturb": "in_forward"},
}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "per_device_train_batch_size": 1}


def run(out: Path, model: Any, options: dict[str, Any], accumulated: int, checkpoint: str | None = None) -> ZOTrainer:
    trainer = made(out, model, tokens(16, ignored=True), gradient_accumulation_steps=accumulated, **SAVED, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def process_of(rank: int, port: int, out: Path, options: dict[str, Any]) -> None:
    """One of two; its model starts with weights of its own, and is resumed with others."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        mine, other = models.opt(2), models.opt(2)
    trainer = run(out, mine, options, 2)
    assert trainer.model_wrapped is trainer.model  # no DistributedDataParallel
    torch.load(out / "checkpoint-2" / "optimizer.pt", map_location=trainer.args.device)  # as earlier Trainers
    torch.save((weights(mine), losses(trainer)), out.parent / f"{rank}.pt")
    torch.distributed.barrier()
    directions = trainer.zo_optimizer.directions // (2 if options.get("parallel") == "directions" else 1)
    told = [log["bytes_sent"] for log in trainer.state.log_history if "loss" in log]
    if options.get("method") != "mezo-svrg":  # whose steps between anchors exchange twice
        agreed = 64  # once, before the first step
        assert told == [agreed + step * (32 + 16 * directions) for step in range(1, 4)]
    assert told[-1] == trainer.zo_optimizer.bytes_sent
    resumed = run(out, other, options, 2, str(out / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(mine))
    with pytest.raises(ValueError, match=r"parallel: expected 'auto', 'batch' or 'directions'"):
        ZOTrainer(mine, arguments(out, parallel="off"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes(name: str, tmp_path: Path) -> None:
    context = children.context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = [context.Process(target=process_of, args=(r, port, tmp_path / "two", RUNS[name])) for r in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join(120)
        assert process.exitcode == 0
    (ours, logged), (theirs, logged_there) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(ours, theirs)
    assert logged == logged_there
    start = seeded(models.opt, 2)
    zo.replay(start, tmp_path / "two" / "trajectory.zo")
    assert_same(weights(start), ours)
    if name != "directions":  # whose processes see batches of their own
        one = run(tmp_path / "one", seeded(models.opt, 2), RUNS[name], 4)
        assert_same(weights(one.model), ours)
        assert losses(one) == logged
