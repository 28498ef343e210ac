"""`zo-finetune replay`: rebuild the model as it was after any step of a run, from the run's trajectory."""

from __future__ import annotations

from pathlib import Path

import zo_kernels as zo
from zo_kernels.finetune.folders import claims, run_folder
from zo_kernels.finetune.runs.job import load_start, sound_trajectory


def rebuild(run: str, step: int | None, out: str, backend: str | None = None) -> str:
    """Write the model after `step` steps (None for all) into the folder `out`, from which it can be loaded.

    A run that was cut off can be rebuilt up to its last complete step. If the trajectory is damaged, steps before the
    damage can be rebuilt by giving their number.

    Returns:
        A line that says what was done.

    Raises:
        ValueError, TypeError, OSError: the run, the step or the folder cannot be used. Nothing has been written.
    """
    config = run_folder.config_of(run)
    own: dict[str, str | None] = {f"RUN's {name}": str(Path(run) / name) for name in claims.RUN.names}
    read = {**own, **claims.sources(config)}
    claims.check_new(out, claims.MODEL_ALONE, read)
    trajectory = sound_trajectory(Path(run) / run_folder.TRAJECTORY, step)
    start = load_start(Path(run), config)
    if start is None:
        raise ValueError(f"{run}: expected a run that has begun, but its folder has no {run_folder.START}")
    steps = trajectory.steps if step is None else step
    zo.replay(start.model, trajectory, steps, backend=backend)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with claims.lock(folder, claims.MODEL_ALONE):
        claims.check_new(out, claims.MODEL_ALONE, read)  # another process may have been faster
        start.save(folder)
    return f"weights after step {steps} of {trajectory.steps}: {folder}"
