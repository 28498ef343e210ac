"""Weights that something other than the optimizer changes after steps: told once, noted once."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from models import block_mlp
from scripted import METHODS, take_step
from small_runs import SHAPE, build, go, same_after_replay

import zo_kernels as zo


@pytest.mark.parametrize("method", METHODS)
def test_weights_changed_after_each_step_are_told_once_and_noted_once(method: str) -> None:
    model = block_mlp(**SHAPE)
    start = copy.deepcopy(model)
    opt = build(method, model, anchor_every=1) if method == "MeZOSVRG" else build(method, model)
    sizes, middle = [], {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(8):
            after = go(opt, model, 1)[-1]
            middle = after if step == 2 else middle
            sizes.append(len(opt.trajectory.to_bytes()))
            if step >= 2:
                with torch.no_grad():
                    model.head.weight.clamp_(-0.1 / (1 + step), 0.1)
    (warning,) = told
    assert warning.filename == take_step.__code__.co_filename
    setup = sizes[3] - sizes[2] - (sizes[2] - sizes[1])
    assert setup > 100 and "after step 3 (clamp_" in str(warning.message)
    assert "(upto=3)" in str(warning.message) and f"takes {setup} bytes" in str(warning.message)
    assert len({b - a for a, b in pairwise(sizes[3:])}) == 1 and sizes[4] - sizes[3] < 60
    same_after_replay(start, opt.trajectory, 3, middle)
    for upto in (4, 7, None):
        with pytest.raises(ValueError, match=r"something other .* after step 3 .*upto=3"):
            zo.replay(copy.deepcopy(start), opt.trajectory, upto)
    assert zo.Trajectory.from_bytes(opt.trajectory.to_bytes()) == opt.trajectory and opt.trajectory.steps == 8


def test_changes_before_the_first_step_are_nobodys_business() -> None:
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model)
    with torch.no_grad():
        model.head.weight.mul_(0.5)
    start = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        final = go(opt, model, 1)[-1]
    same_after_replay(start, opt.trajectory, None, final)
