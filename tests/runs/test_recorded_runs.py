"""Runs that version 0.1.0 recorded lead this version to the same weights, to the last bit."""

from __future__ import annotations

import json

import pytest
from recorded.make import FOLDER, KINDS, STEPS, digest, model_of

import zo_kernels as zo


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_an_earlier_version_is_replayed(kind: str) -> None:
    _, dtype, _ = KINDS[kind]
    trajectory = zo.Trajectory.load(FOLDER / f"{kind}.zo")
    assert trajectory.steps == STEPS
    model = model_of(dtype)
    zo.replay(model, trajectory)
    assert digest(model) == json.loads((FOLDER / "ends.json").read_text())[kind]
