"""Everything that is made before the first step of a run, so that whatever is wrong shows at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zo_kernels as zo
from zo_kernels.finetune import classification, prompt_learner, run_folder
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.learner import Learner, Predictor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    config: Config
    folder: Path
    learner: Learner
    optimizer: zo.ZeroOrderOptimizer

    @property
    def classifier(self) -> nn.Module:
        """The module that is trained."""
        return self.learner.predictor.model


def prepare(config: Config, *, resume: bool = False) -> Job:
    """Data, model, optimizer and run folder. Sets PyTorch's number of threads and its seed.

    Args:
        config: of the run.
        resume: go on with the run in `config.out`: its head and its trajectory are taken, and no folder is made. The
            weights are those that it started with until `resume_weights`.

    Raises ValueError, TypeError or OSError for settings, data or a model that cannot be used.
    """
    return prepare_run(config, prepare_learner(config, Path(str(config.out)) if resume else None), resume=resume)


def prepare_learner(config: Config, run: Path | None = None) -> Learner:
    """Data and model. Sets PyTorch's number of threads and its seed.

    Args:
        config: of the run.
        run: a folder whose start is taken, if it holds one: a head is computed by forwards, whose last bits another
            machine need not share.

    Raises ValueError, TypeError or OSError for settings, data or a model that cannot be used.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device, dtype = _device(config.device), _DTYPES[config.dtype]
    if config.task is not None:
        return prompt_learner.prompt_learner(config, device, dtype)
    begun = run if run is not None and run_folder.begun(run) else None
    return classification.classifier_learner(config, device, dtype, begun)


def prepare_run(config: Config, learner: Learner, *, resume: bool = False) -> Job:
    """Optimizer and run folder, for a learner that has the weights which the run starts with; as `prepare`."""
    optimizer = _optimizer(config, learner.predictor.model)
    folder = Path(str(config.out))
    # Last, so that a run that cannot start leaves nothing behind.
    if not resume:
        run_folder.create(config)
    if not run_folder.begun(folder):
        learner.predictor.save_start(folder)
    if not (folder / run_folder.TRAJECTORY).exists():
        optimizer.record_to(folder / run_folder.TRAJECTORY)
    return Job(config, folder, learner, optimizer)


def load_start(folder: Path, config: Config) -> Predictor | None:
    """What a run started with, on the CPU. None if it did not get so far."""
    if not run_folder.begun(folder):
        return None
    if config.task is not None:
        return prompt_learner.load_start(config, _DTYPES[config.dtype])
    return classification.load_start(folder, config)


def resume_weights(job: Job) -> None:
    """Bring the weights and the optimizer to where the run's trajectory ends.

    Raises ValueError if it does not fit to the model.
    """
    trajectory = job.folder / run_folder.TRAJECTORY
    if trajectory.exists():
        job.optimizer.resume(trajectory)


def _optimizer(config: Config, model: nn.Module) -> zo.ZeroOrderOptimizer:
    options: dict[str, Any] = {
        "lr": config.lr,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "directions": config.directions,
        "sparsity": config.sparsity,
        "drop": config.drop,
        "backend": config.backend,
        "perturb": config.perturb,
        "rounding": config.rounding,
    }
    if (anchor := config.anchor) is not None:
        return zo.MeZOSVRG(model, anchor_lr=anchor.lr, anchor_every=anchor.every, **options)
    methods = {"mezo": zo.MeZO, "sparse-mezo": zo.SparseMeZO, "lezo": zo.LeZO}
    return methods[config.method](model, **options)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device that PyTorch can use here, got {name!r}: {error}") from error
    return device
