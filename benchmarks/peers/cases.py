"""`peers`: the same model, batch, lr and ε, stepped by other packages and by ours: time, memory, exactness, loss."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from functools import partial

from zo_kernels.backends.native import instruction_sets

from ..bench.document import milliseconds, number
from ..bench.registry import Case, Row
from ..bench.timing import Plan
from ..step.shapes import SHAPES, Batch
from . import CHECKOUTS
from .adapters import PEERS
from .check import Settings
from .measure import EXPERIMENTS, Spec, apart

_EPS = 1e-3
_SEED = 1  # of the steps that are timed and checked
_SMALL = {"opt-125m": Batch(1, 32)}  # where passes dominate; the others' own batches are of fine-tuning


def cases(options: Namespace) -> list[Case]:
    return [
        _case(shape, peer, experiment, options)
        for shape in dict.fromkeys(options.shape)
        for experiment in EXPERIMENTS
        for peer in PEERS
        if (peer, experiment) != ("ours", "time")  # every row of time has ours
    ]


def _case(shape: str, peer: str, experiment: str, options: Namespace) -> Case:
    usual = _SMALL.get(shape, SHAPES[shape].batch)
    batch = Batch(options.batch or usual.examples, options.tokens or usual.tokens)
    path = getattr(options, peer.replace("-", "_")) if peer in CHECKOUTS else None
    spec = Spec(
        experiment, peer, path, shape, batch, options.threads, Settings(options.lr, _EPS, _SEED),
        options.steps, options.seeds, Plan(options.rounds, options.seconds),
    )  # fmt: skip
    facts = {
        "experiment": experiment,
        "backend": f"native:{instruction_sets()[0]}" if instruction_sets() else "default",
        "device": "cpu",
        "dtype": "float32",
        "threads": options.threads,
        "shape": shape,
        "batch": batch.examples,
        "tokens": batch.tokens,
        "peer": peer,
        "lr": options.lr,
        "eps": _EPS,
    }
    missing = None
    if importlib.util.find_spec("transformers") is None:
        missing = "transformers is not installed"
    elif peer in CHECKOUTS and path is None:
        missing = f"it needs --{peer} PATH, a checkout of {CHECKOUTS[peer]}"
    return Case(f"{shape}/{peer}/{experiment}", facts, partial(apart, spec), missing)


_FAULTS = {
    "same_seed_same_bits": "does not repeat",
    "noise_differs": "equal for equal shapes",
    "other_seed_other_bits": "the same for another seed",
    "seed_0_works": "not repeated by seed 0",
}
_CELLS: dict[str, Callable[[Row], dict[str, str]]] = {
    "time": lambda row: {
        "ms/step": milliseconds(row["seconds_median"]),
        "forwards": milliseconds(row["forwards_seconds_median"]),
        "its forwards": milliseconds(row["baseline_forwards_seconds_median"]),
    },
    "memory": lambda row: {
        "peak MiB": f"{row['peak_memory_mib']:,.1f}",
        "extra MiB": f"{row['extra_memory_mib']:,.1f}",
        "of weights": f"{row['extra_memory_mib'] / row['weights_mib']:.2f}",
        "ours": f"{row['ours_extra_memory_mib']:,.1f}",
        "target missed": row["target_missed"] or "",
    },
    "exact": lambda row: {
        "restored, off by": "nothing" if row["restored_bits"] else f"{row['restored_relative_rms']:.1e}",
        "seeded by": row["peer_seeded_by"],
        # None where there is no seed to choose.
        "its noise": ", ".join(text for name, text in _FAULTS.items() if row[name] is False) or "repeats",
    },
    "loss": lambda row: {
        "runs": str(row["runs"]),
        "steps": str(row["steps"]),
        "lr": f"{row['lr']:g}",
        "loss before": number(row, "loss_before", ".4f"),
        "after": number(row, "loss_after", ".4f"),
    },
}


def cells(row: Row) -> dict[str, str]:
    return _CELLS[row["experiment"]](row)


def notes() -> list[str]:
    return [
        "Each peer has a process of its own, in which our steps are timed in turn with its steps. SPSA with one "
        "direction, fp32, weight decay 0, dropout off. Extra MiB: the peak of a step, less that of two forwards. "
        "Restored: how far a step with lr = 0 leaves the weights, RMS of it by RMS of them."
    ]
