"""Everything that is made before the first step of a run, so that whatever is wrong shows at once."""

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
from zo_kernels.finetune.config import DEFAULT_ANCHOR, Config
from zo_kernels.finetune.folders import claims, run_folder
from zo_kernels.finetune.folders.metrics import Metrics
from zo_kernels.finetune.learner import Learner, Predictor
from zo_kernels.finetune.prompts import learner as prompts
from zo_kernels.trajectory import FaultyTrajectory

_OF_NO_STEP = ("out", "overwrite")  # a folder may be moved
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """A run that is ready to start; nobody else can write its folder until `lock` is released."""

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
    """Data, model, optimizer and run folder. Sets PyTorch's number of threads and its seed.

    Args:
        config: of the run.
        resume: go on with the run in `config.out`: its head and its trajectory are taken, and no folder is made. The
            weights are those that it started with until `resume_weights`.
        recover: go on from the longest sound beginning of what is damaged, which is kept beside.

    Raises ValueError, TypeError or OSError for settings, data, a model or a folder that cannot be used.
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
    learner: Learner
    if config.task is not None:
        learner = prompts.prompt_learner(config, device, dtype)
    else:
        begun = run if run is not None and run_folder.begun(run) else None
        learner = classifier.classifier_learner(config, device, dtype, begun)
    _check_anchor(config, learner)
    return learner


def _check_anchor(config: Config, learner: Learner) -> None:
    """Raise ValueError if more examples are asked for than there are: some would be taken again and again."""
    asked, there = config.anchor_examples, len(learner.train)
    if asked is not None and asked > there and asked != DEFAULT_ANCHOR.examples:
        raise ValueError(f"--anchor-examples: expected at most {there}, the training examples, got {asked}")


def prepare_run(
    config: Config,
    learner: Learner,
    *,
    resume: bool = False,
    recover: bool = False,
    held: files.Locked | None = None,
) -> Job:
    """Optimizer and run folder, for a learner that has the weights which the run starts with; as `prepare`.

    Args:
        held: the folder's lock, if one has it.
    """
    optimizer = _optimizer(config, learner.predictor.model)
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
    """What a run started with, on the CPU. None if it did not get so far."""
    if not run_folder.begun(folder):
        return None
    if config.task is not None:
        return prompts.load_start(config, _DTYPES[config.dtype])
    return classifier.load_start(folder, config)


def resume_weights(job: Job, reached: int) -> None:
    """Bring the weights and the optimizer to where the run's trajectory ends, or begin one.

    Args:
        reached: the step up to which the run is known to have come.

    Raises ValueError if it is damaged, ends before, or does not fit to the model; but for an incomplete last record,
    nothing has changed.
    """
    path = job.folder / run_folder.TRAJECTORY
    if not job.recover:
        steps = sound_trajectory(path).steps if path.exists() else 0
        if steps < reached:  # each step is in the trajectory before it is in the metrics
            raise ValueError(
                f"{path}: expected the {reached} steps that {run_folder.METRICS} speaks of, got {steps}: the rest is "
                "lost. If there is a copy of it, put it back; --recover goes on from where it ends"
            )
    job.optimizer.resume(path, missing_ok=True, recover=job.recover)


def sound_trajectory(path: Path, step: int | None = None) -> zo.Trajectory:
    """A run's trajectory, without a last record that a killed process left incomplete; of one that is damaged what is
    sound, if that has the step that is asked for.

    Raises ValueError if it is damaged, OSError if it cannot be read.
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


def record_start(job: Job, metrics: Metrics) -> dict[str, Any]:
    """Write the record "start", or compare with the one that is there, and return it.

    Raises ValueError if data, versions or settings have changed.
    """
    start, before = _start(job), metrics.find("start")
    changed = {} if before is None else {k: (before.get(k), v) for k, v in start.items() if before.get(k) != v}
    if changed:
        told = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"--resume: expected what the run was started with: {told}")
    settings = {name: value for name, value in asdict(job.config).items() if name not in _OF_NO_STEP}
    if before is None:
        metrics.write("start", **start, notes=list(job.learner.notes), settings=settings)
    else:
        _check_settings(job.folder / run_folder.CONFIG, before.get("settings", settings), settings)
    return {**start, "notes": job.learner.notes}


def _check_settings(path: Path, before: Any, now: dict[str, Any]) -> None:
    """Raise ValueError naming those that somebody has changed since the run was started."""
    before = before if isinstance(before, dict) else {}
    if changed := [name for name in sorted(now.keys() & before.keys()) if now[name] != before[name]]:
        told = ", ".join(f"{name} {before[name]!r} (now {now[name]!r})" for name in changed)
        raise ValueError(
            f"{path}: expected the settings that the run was started with: {told}: put them back, or start another run"
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
