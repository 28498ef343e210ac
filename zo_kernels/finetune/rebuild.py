"""The model as it was after any step of a run, from the run's trajectory."""

from __future__ import annotations

from pathlib import Path

import zo_kernels as zo
from zo_kernels.finetune import run_folder
from zo_kernels.finetune.job import load_start


def rebuild(run: str, step: int | None, out: str, backend: str | None = None) -> str:
    """Write the model after `step` steps (None for all) into the folder `out`, from which it can be loaded.

    Of a run that was cut off, the steps that its trajectory has whole can be had.

    Returns:
        A line that says what was done.

    Raises:
        ValueError, TypeError, OSError: the run, the step or the folder cannot be used; nothing has been written.
    """
    config = run_folder.config_of(run)
    start = load_start(Path(run), config)
    if start is None:
        raise ValueError(f"{run}: expected a run that has begun, got one without {run_folder.START}")
    trajectory = zo.Trajectory.load(Path(run) / run_folder.TRAJECTORY, recover=True)
    steps = trajectory.steps if step is None else step
    zo.replay(start.model, trajectory, steps, backend=backend)
    folder = run_folder.empty(out, "--out")
    start.save(folder)
    return f"weights after step {steps} of {trajectory.steps}: {folder}"
