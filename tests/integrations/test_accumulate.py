"""`accelerate.accumulate` steps with the last micro-batch alone: told, where it is accelerate that takes the step."""

from __future__ import annotations

import warnings
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import zo_kernels as zo


def epoch(micro_batches: int, *, prepared: bool = True, **options: Any) -> tuple[zo.MeZO, list[str]]:
    model = nn.Linear(3, 2)
    opt = zo.MeZO(model, lr=1e-4, **options)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    used = accelerator.prepare(opt) if prepared else opt
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(8):
            x = torch.randn(4, 3)
            with accelerator.accumulate(model):
                used.step(lambda x=x: model(x).square().mean())
    return opt, [str(w.message) for w in told]


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    accelerate.state.GradientState._reset_state()


def test_micro_batches_that_never_count_are_told_once() -> None:
    opt, (told,) = epoch(2)
    assert opt.step_count == 4
    assert "accelerate: expected gradient_accumulation_steps=1, got 2: it calls this optimizer for one of 2" in told
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1, got 4"):
        epoch(4, strict=True)


@pytest.mark.parametrize("options", [{"micro_batches": 1}, {"micro_batches": 2, "prepared": False}], ids=str)
def test_steps_that_all_count_are_not(options: dict[str, Any]) -> None:
    opt, told = epoch(**options)
    assert opt.step_count == 8 and told == []
