"""A rank that torchrun starts: it is killed once, and its run goes on from the trajectory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import scenarios
import torch
from models import block_mlp
from torch import distributed

import zo_kernels as zo


def main(folder: Path, steps: int, killed_at: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    model = block_mlp(**scenarios.SHAPE)
    opt = zo.MeZO(model, lr=1e-2, seed=7)
    opt.resume(folder / "run.zo", missing_ok=True)
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    while opt.step_count < steps:
        if first_attempt and distributed.get_rank() == 1 and opt.step_count == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        scenarios.take_step(opt, model, None, "batch")
    torch.save(scenarios.weights_of(model), folder / f"rank-{distributed.get_rank()}.pt")
    (folder / f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}").touch()
