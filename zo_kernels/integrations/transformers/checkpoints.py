"""The trajectory among the files of a run, and which checkpoints can be gone on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

TRAJECTORY = "trajectory.zo"


def last_whole(output_dir: Path) -> str | None:
    """The checkpoint after the most steps, without those that a run was killed in the middle of writing."""
    found = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and _is_whole(folder):
            found[int(step)] = folder
    return str(found[max(found)]) if found else None


def _is_whole(folder: Path) -> bool:
    """The trainer's state is written last."""
    try:
        return isinstance(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def check_resumable(checkpoint: str) -> None:
    """Raise ValueError unless it has all that a run goes on from."""
    missing = [n for n in (OPTIMIZER_NAME, SCHEDULER_NAME, TRAJECTORY) if not (Path(checkpoint) / n).is_file()]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint of ZOTrainer, got {checkpoint} without "
            f"{', '.join(missing)} (save_only_model=True leaves them out); to start a new run from its weights, load "
            "the model from it and leave resume_from_checkpoint out"
        )


def take_back(checkpoint: str, output_dir: Path) -> None:
    """Put the checkpoint's trajectory in the place of the run's, which may have gone further."""
    target = output_dir / TRAJECTORY
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_suffix(".zo.new")
    shutil.copyfile(Path(checkpoint) / TRAJECTORY, copy)
    os.replace(copy, target)
