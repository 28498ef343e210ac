"""Everything that is made before the first step of a run, so that whatever is wrong shows at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import zo_kernels as zo
from zo_kernels.finetune import run_folder
from zo_kernels.finetune.batches import Texts
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.data import Split, from_tables
from zo_kernels.finetune.docstrings import stdlib_docstrings
from zo_kernels.finetune.minilm import minilm_folder
from zo_kernels.finetune.model import Classifier, freeze, load_encoder, start_head

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    config: Config
    folder: Path
    classifier: Classifier
    tokenizer: Any
    names: tuple[str, ...]
    train: Texts
    dev: Texts
    test: Texts
    optimizer: zo.ZeroOrderOptimizer


def prepare(config: Config, *, resume: bool = False) -> Job:
    """Data, model, optimizer and run folder. Sets PyTorch's number of threads and its seed.

    Args:
        config: of the run.
        resume: go on with the run in `config.out`: its head and its trajectory are taken, and no folder is made. The
            weights are those that it started with until `resume_weights`.

    Raises ValueError, TypeError or OSError for settings, data or a model that cannot be used.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = _device(config.device)
    if config.data is None:
        data = stdlib_docstrings(seed=config.seed)
    else:
        data = from_tables(config.data, config.test_data, seed=config.seed)
    dtype = _DTYPES[config.dtype]
    encoder, tokenizer, hidden_size = load_encoder(pretrained(config), dtype)
    classifier = Classifier(encoder, hidden_size, len(data.names)).to(device=device, dtype=dtype).eval()

    def tokenize(split: Split) -> Texts:
        return Texts.tokenize(tokenizer, split.texts, split.labels, config.max_tokens, device)

    train, dev, test = tokenize(data.train), tokenize(data.dev), tokenize(data.test)
    train.check_batch_size(config.batch_size)
    folder = Path(str(config.out))
    started = run_folder.load_start(folder, pretrained(config)) if resume else None
    if started is None:
        start_head(classifier, config.head_start, tokenizer, data.names, train, config.shots)
    elif started.names != data.names:
        raise ValueError(f"--resume: expected the labels {started.names} in the data, got {data.names}")
    else:  # computed by forwards, whose last bits another machine need not share
        classifier.head.load_state_dict(started.model.head.state_dict())
    freeze(classifier, config.freeze)
    optimizer = _optimizer(config, classifier)
    # Last, so that a run that cannot start leaves nothing behind.
    if not resume:
        run_folder.create(config)
    if started is None:
        run_folder.save_start(folder, classifier, data.names, config.max_tokens)
    if not (folder / run_folder.TRAJECTORY).exists():
        optimizer.record_to(folder / run_folder.TRAJECTORY)
    return Job(config, folder, classifier, tokenizer, data.names, train, dev, test, optimizer)


def pretrained(config: Config) -> str:
    """Folder or hub id of the run's encoder."""
    return config.model or str(minilm_folder())


def resume_weights(job: Job) -> None:
    """Bring the weights and the optimizer to where the run's trajectory ends.

    Raises ValueError if it does not fit to the model.
    """
    trajectory = job.folder / run_folder.TRAJECTORY
    if trajectory.exists():
        job.optimizer.resume(trajectory)


def _optimizer(config: Config, classifier: Classifier) -> zo.ZeroOrderOptimizer:
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
        return zo.MeZOSVRG(classifier, anchor_lr=anchor.lr, anchor_every=anchor.every, **options)
    methods = {"mezo": zo.MeZO, "sparse-mezo": zo.SparseMeZO, "lezo": zo.LeZO}
    return methods[config.method](classifier, **options)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device that PyTorch can use here, got {name!r}: {error}") from error
    return device
