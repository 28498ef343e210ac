"""Everything that is made before the first step of a run, so that mistakes show at once."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zo_kernels as zo
from zo_kernels import files
from zo_kernels.finetune.classifier import learner as classifier
from zo_kernels.finetune.config import AUTO, DEFAULT_ANCHOR, Config
from zo_kernels.finetune.folders import claims, run_folder
from zo_kernels.finetune.folders.metrics import Metrics
from zo_kernels.finetune.learner import Learner, Predictor
from zo_kernels.finetune.prompts import learner as prompts
from zo_kernels.trajectory import FaultyTrajectory

_OF_NO_STEP = ("out", "overwrite")  # do not decide any bit; a folder may be moved
# Settings that earlier versions did not have, and what their runs did.
_ADDED = {
    "distribution": "normal", "estimator": "two_sided", "normalize": "none", "mask": "redrawn",
    "anneal": None, "anneal_above": None,
}  # fmt: skip
_OF_SVRG = {"estimator": None, "normalize": None}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """A run that is ready to start. No other process can write its folder until `lock` is released."""

    config: Config
    folder: Path
    learner: Learner
    optimizer: zo.ZeroOrderOptimizer
    lock: files.Locked
    recover: bool = False

    @property
    def classifier(self) -> nn.Module:
        """The module that is trained."""
        return self.learner.predictor.model


def prepare(config: Config, *, resume: bool = False, recover: bool = False) -> Job:
    """Prepare data, model, optimizer and run folder. Sets PyTorch's number of threads and its seed.

    Args:
        config: the settings of the run.
        resume: resume the run in `config.out` with the head it started with. The weights are those of its start until
            `resume_weights`.
        recover: if files are damaged, resume from their longest sound beginning and keep a copy.

    Raises ValueError, TypeError or OSError if the settings, the data, the model or the folder cannot be used.
    """
    if not resume:
        claims.check_run(config)  # before anything that takes long
        return prepare_run(config, prepare_learner(config))
    folder = Path(str(config.out))
    held = claims.claim_again(folder)
    try:
        return prepare_run(config, prepare_learner(config, folder), resume=True, recover=recover, held=held)
    except BaseException:
        held.release()
        raise


def prepare_learner(config: Config, run: Path | None = None) -> Learner:
    """Prepare data and model. Sets PyTorch's number of threads and its seed.

    Args:
        config: the settings of the run.
        run: a run folder. If it holds the head that the run started with, use that head, since on another machine the
            last bits of a new one may differ.

    Raises ValueError, TypeError or OSError if the settings, the data or the model cannot be used.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device, dtype = _device(config.device), _DTYPES[config.dtype]
    learner: Learner
    if config.task is not None:
        learner = prompts.prompt_learner(config, device, dtype)
    else:
        begun = run if run is not None and run_folder.begun(run) else None
        learner = classifier.classifier_learner(config, device, dtype, begun)
    _check_anchor(config, learner)
    return learner


def _check_anchor(config: Config, learner: Learner) -> None:
    """Raise ValueError if more examples are asked for than there are. Some would be used again and again."""
    asked, there = config.anchor_examples, len(learner.train)
    if asked is not None and asked > there and asked != DEFAULT_ANCHOR.examples:
        raise ValueError(f"--anchor-examples: expected at most {there}, the number of training examples, got {asked}")


def prepare_run(
    config: Config,
    learner: Learner,
    *,
    resume: bool = False,
    recover: bool = False,
    held: files.Locked | None = None,
) -> Job:
    """Prepare optimizer and run folder for a learner with the starting weights; otherwise as `prepare`.

    Args:
        held: the lock of the folder, if the caller holds it.
    """
    make, options = optimizer_of(config)
    lr: Any = 0.0 if config.lr == AUTO else config.lr  # until it is found
    optimizer = make(learner.predictor.model, lr=lr, **options)
    folder = Path(str(config.out))
    # Last, so that a run that cannot start leaves nothing behind.
    held = held or (claims.claim_again(folder) if resume else claims.claim(config))
    try:
        if not run_folder.begun(folder):
            learner.predictor.save_start(folder)
        if not resume:
            optimizer.record_to(folder / run_folder.TRAJECTORY)
    except BaseException:
        held.release()
        raise
    return Job(config, folder, learner, optimizer, held, recover)


def load_start(folder: Path, config: Config) -> Predictor | None:
    """The model that a run started with, on the CPU. None if the run was cut off before it saved its start."""
    if not run_folder.begun(folder):
        return None
    if config.task is not None:
        return prompts.load_start(config, _DTYPES[config.dtype])
    return classifier.load_start(folder, config)


def resume_weights(job: Job, reached: int) -> None:
    """Bring the weights and the optimizer to the end of the run's trajectory, or begin a trajectory.

    Args:
        job: the run.
        reached: the last step that the metrics have.

    Raises ValueError if the trajectory is damaged, ends before `reached`, or does not fit to the model. Then nothing
    has changed, except that an incomplete last record may be gone.
    """
    path = job.folder / run_folder.TRAJECTORY
    if not job.recover:
        steps = sound_trajectory(path).steps if path.exists() else 0
        if steps < reached:  # a step is written to the trajectory first
            raise ValueError(
                f"{path}: expected the {reached} steps that {run_folder.METRICS} speaks of, got {steps}: the rest is "
                "lost. If there is a copy of it, put it back; --recover goes on from where it ends"
            )
    job.optimizer.resume(path, missing_ok=True, recover=job.recover)


def sound_trajectory(path: Path, step: int | None = None) -> zo.Trajectory:
    """Load the trajectory of a run. A last record that a killed process left incomplete is dropped.

    If the trajectory is damaged but `step` comes before the damage, its sound beginning is returned.

    Raises ValueError if it is damaged otherwise, OSError if it cannot be read.
    """
    try:
        return zo.Trajectory.load(path, recover="incomplete")
    except FaultyTrajectory as error:
        fault = error.fault
        if not fault.recoverable:
            raise
        sound = zo.Trajectory.load(path, recover=True)
        if step is not None and step <= sound.steps:
            return sound
        run = path.parent
        raise ValueError(
            f"{path}: record {fault.record}, at byte {fault.byte}: {fault.reason}; {sound.steps} steps come before it: "
            f"`zo-finetune --resume {run} --recover` goes on from there and keeps the rest beside, `zo-finetune replay "
            f"{run} --step N` takes up to {sound.steps}"
        ) from error


def optimizer_of(config: Config) -> tuple[type[zo.ZeroOrderOptimizer], dict[str, Any]]:
    """The class of the optimizer, and its options but the learning rate."""
    options: dict[str, Any] = {
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "directions": config.directions,
        "sparsity": config.sparsity,
        "mask": config.mask,
        "drop": config.drop,
        "backend": config.backend,
        "perturb": config.perturb,
        "rounding": config.rounding,
        "distribution": config.distribution,
    }
    if (anchor := config.anchor) is not None:
        options |= {"anchor_lr": anchor.lr, "anchor_every": anchor.every, "anneal": config.anneal}
        if config.anneal_above is not None:
            options["anneal_above"] = config.anneal_above
        return zo.MeZOSVRG, options
    if config.method == "fzoo":
        return zo.FZOO, options
    options |= {"estimator": config.estimator, "normalize": config.normalize}
    methods = {"mezo": zo.MeZO, "sparse-mezo": zo.SparseMeZO, "lezo": zo.LeZO}
    return methods[config.method], options


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device that PyTorch can use here, got {name!r}: {error}") from error
    return device


def record_start(job: Job, metrics: Metrics) -> dict[str, Any]:
    """Write the record "start": everything that decides the bits of a run. A resumed run compares it instead.

    Returns what `report.opening_lines` tells of. Raises ValueError if data, versions or settings have changed.
    """
    start, before = _start(job), metrics.find("start")
    changed = {} if before is None else {k: (before.get(k), v) for k, v in start.items() if before.get(k) != v}
    if changed:
        told = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"--resume: expected the same data, model and versions as at the start of the run: {told}")
    settings = {name: value for name, value in asdict(job.config).items() if name not in _OF_NO_STEP}
    if before is None:
        metrics.write("start", **start, notes=list(job.learner.notes), settings=settings)
    else:
        _check_settings(job.folder / run_folder.CONFIG, before.get("settings", settings), settings)
    return {**start, "distribution": job.config.distribution, "notes": job.learner.notes}


def _check_settings(path: Path, before: Any, now: dict[str, Any]) -> None:
    """Raise ValueError that names settings which were changed since the run was started."""
    if not isinstance(before, dict):
        before = {}
    before = {**_ADDED, **(_OF_SVRG if now["method"] == "mezo-svrg" else {}), **before} if before else {}
    if changed := [name for name in sorted(now.keys() & before.keys()) if now[name] != before[name]]:
        told = ", ".join(f"{name} {before[name]!r} (now {now[name]!r})" for name in changed)
        raise ValueError(
            f"{path}: expected the settings that the run was started with, got {told}: restore them, or start a new run"
        )


def _start(job: Job) -> dict[str, Any]:
    config, learner = job.config, job.learner
    parameters = list(learner.predictor.model.parameters())
    return {
        "model": config.model or "all-MiniLM-L6-v2",
        "data": config.data or config.task_data or config.task or "docstrings of the standard library",
        "method": config.method,
        "dtype": config.dtype,
        "labels": list(learner.predictor.names),
        **{name: len(examples) for name, examples in learner.splits.items()},
        "cut": sum(examples.cut for examples in learner.splits.values()),
        "max_tokens": learner.predictor.max_tokens,
        "texts": [examples.digest() for examples in learner.splits.values()],
        "perturb": job.optimizer.perturb,
        "weights": sum(p.numel() for p in parameters),
        "weights_trained": sum(p.numel() for p in parameters if p.requires_grad),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zo_kernels": zo.__version__,
        **learner.facts(),
    }
