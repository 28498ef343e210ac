"""What several tests of runs start with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import block_mlp
from small_runs import SHAPE, build, go
from torch import nn


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path, list[dict[str, torch.Tensor]]]:
    """A model as a run started with it, the run's file, and its weights at every step."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model)
    seen = go(opt, model, 5)
    opt.trajectory.save(tmp_path / "run.zo")
    return start, tmp_path / "run.zo", seen
