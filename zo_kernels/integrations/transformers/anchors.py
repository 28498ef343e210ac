"""Batches drawn for a step beside those that the Trainer reads: at an anchor of MeZO-SVRG, and to find a rate."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from zo_kernels.spec import direction_seed

# Of `direction_seed`: no direction has these numbers.
ANCHOR_SLOT = 2**19
RATE_SLOT = 2**19 + 1


def anchor_batches(
    loader: DataLoader, examples: int, *, seed: int, step: int, rank: int, processes: int, slot: int = ANCHOR_SLOT
) -> list[Any]:
    """Batches that depend only on the seed, the step and the slot, so that a resumed run sees the same.

    Args:
        loader: of the training examples; its batch size, collator and dataset are used.
        examples: how many, over all processes; all of them if there are fewer.
        seed: of the run.
        step: of the optimizer.
        rank: of this process, which gets its share.
        processes: how many there are.

    Raises ValueError if the dataset has no length, or too few examples for the processes.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "train_dataset: expected one with a length and indices, from which mezo-svrg and find_lr draw, got "
            f"{type(dataset).__name__}; choose another method, or set learning_rate"
        )
    generator = torch.Generator().manual_seed(direction_seed(seed, step, slot) >> 1)
    own = torch.randperm(len(dataset), generator=generator, device="cpu")[:examples][rank::processes].tolist()
    if not own:
        raise ValueError(f"anchor_examples: expected at least one for each of {processes} processes, got {examples}")
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or len(own)
    assert loader.collate_fn is not None
    return [loader.collate_fn([dataset[i] for i in own[at : at + size]]) for at in range(0, len(own), size)]
