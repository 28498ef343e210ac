"""The trajectory file of a run, and which checkpoints a run can be resumed from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from zo_kernels import Trajectory, files

TRAJECTORY = "trajectory.zo"

logger = logging.get_logger(__name__)


def last_whole(output_dir: Path) -> str | None:
    """The checkpoint with the most steps, except those that a killed run left incomplete."""
    found = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and _is_whole(folder):
            found[int(step)] = folder
    return str(found[max(found)]) if found else None


def _is_whole(folder: Path) -> bool:
    """The trainer's state is written last; a power cut may have emptied what was written before."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(state, dict) or f"{PREFIX_CHECKPOINT_DIR}-{state.get('global_step')}" != folder.name:
        return False
    if empty := [path.name for path in folder.iterdir() if path.is_file() and not path.stat().st_size]:
        logger.warning(f"{folder} is passed over: {', '.join(sorted(empty))} is empty, as a power cut leaves files.")
    return not empty


def check_resumable(checkpoint: str) -> None:
    """Raise ValueError unless the checkpoint has everything needed to resume."""
    missing = [n for n in (OPTIMIZER_NAME, SCHEDULER_NAME, TRAJECTORY) if not (Path(checkpoint) / n).is_file()]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint of ZOTrainer, got {checkpoint} without "
            f"{', '.join(missing)} (save_only_model=True leaves them out); to start a new run from its weights, load "
            "the model from it and leave resume_from_checkpoint out"
        )


def take_back(checkpoint: str, output_dir: Path) -> None:
    """Replace the run's trajectory by that of the checkpoint, since later steps are taken again.

    If the replaced file has steps of another run or of later checkpoints, it is kept under another name.

    Raises ValueError if the checkpoint's trajectory is damaged, BlockingIOError if another process writes the run's;
    then nothing has changed.
    """
    source, target = Path(checkpoint) / TRAJECTORY, output_dir / TRAJECTORY
    data = Trajectory.load(source).to_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and (before := _bytes_of(target)) != data:
        last = last_whole(output_dir)
        is_last = last is None or os.path.realpath(last) == os.path.realpath(checkpoint)
        if not (is_last and before.startswith(data)) and not data.startswith(before):
            set_aside(target)
    files.replace(target, data)


def _bytes_of(trajectory: Path) -> bytes:
    """Raises BlockingIOError if another process writes it."""
    with trajectory.open("r+b") as file:
        if not files.lock(file.fileno()):
            raise BlockingIOError(f"{trajectory}: expected a run that has ended, but another process writes it")
        try:
            return file.read()
        finally:
            files.forget(file.fileno())


def set_aside(trajectory: Path) -> None:
    """Rename a file that is about to be replaced, and say so. Raises BlockingIOError as `_bytes_of` does."""
    _bytes_of(trajectory)
    kept = files.unused(trajectory, "replaced")
    os.replace(trajectory, kept)
    files.sync_folder(kept.parent)
    logger.warning(f"{trajectory} of an earlier run is kept as {kept.name}.")
