"""What every test of the optimizers has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import block_mlp
from small_runs import SHAPE, build, go
from torch import nn

from zo_kernels.backends.types import Pass
from zo_kernels.ops import Table


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of the tensors that each pass was given."""
    seen: list[set[str]] = []
    apply = Table.apply

    def counting(self: Table, do: Pass, *then: Any) -> None:
        indices = range(len(self.names)) if do.active is None else do.active
        seen.append({self.names[i] for i in indices})
        apply(self, do, *then)

    monkeypatch.setattr(Table, "apply", counting)
    return seen


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path, list[dict[str, torch.Tensor]]]:
    """A model as a run started with it, the run's file, and its weights at every step."""
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build("MeZO", model)
    seen = go(opt, model, 5)
    opt.trajectory.save(tmp_path / "run.zo")
    return start, tmp_path / "run.zo", seen
