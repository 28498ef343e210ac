"""`peers`: the same model, batch, lr and ε, stepped by other packages and by ours: time, exactness, loss."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from functools import partial

from zo_kernels.backends.native import instruction_sets

from ..bench.registry import Case, Row, verdicts
from ..step.shapes import SHAPES, Batch
from . import apart
from .adapters import PEERS
from .measure import EXPERIMENTS
from .options import CHECKOUTS
from .spec import Spec

_EPS = 1e-3
_SMALL = {"opt-125m": Batch(1, 32)}  # where passes dominate; the others' own batches are of fine-tuning


def cases(options: Namespace) -> list[Case]:
    return [
        _case(shape, peer, experiment, options)
        for shape in dict.fromkeys(options.shape)
        for experiment in EXPERIMENTS
        for peer in PEERS
        if (peer, experiment) != ("ours", "time")  # which stands in every row of time
    ]


def _case(shape: str, peer: str, experiment: str, options: Namespace) -> Case:
    usual = _SMALL.get(shape, SHAPES[shape].batch)
    adapter = PEERS[peer]
    path = getattr(options, adapter.checkout) if adapter.checkout else None
    spec = Spec(
        experiment, peer, path, shape, options.batch or usual.examples, options.tokens or usual.tokens, options.threads,
        options.lr, _EPS, options.steps, options.seeds, options.rounds, options.seconds,
    )  # fmt: skip
    facts = {
        "experiment": experiment,
        "backend": f"native:{instruction_sets()[0]}" if instruction_sets() else "default",
        "device": "cpu",
        "dtype": "float32",
        "threads": spec.threads,
        "shape": shape,
        "batch": spec.batch,
        "tokens": spec.tokens,
        "peer": peer,
        "lr": spec.lr,
        "eps": spec.eps,
    }
    return Case(f"{shape}/{peer}/{experiment}", facts, partial(apart.run, spec), _missing(adapter.checkout, path))


def _missing(checkout: str | None, path: str | None) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if checkout is None:
        return None
    option = f"--{checkout.replace('_', '-')}"
    if path is None:
        return f"it needs {option} PATH, a checkout of {CHECKOUTS[checkout]}"
    return None


def cells(row: Row) -> dict[str, str]:
    return _CELLS[row["experiment"]](row)


def _time(row: Row) -> dict[str, str]:
    return {
        "ms/step": f"{row['seconds_median'] * 1e3:,.0f}",
        "forwards": f"{row['forwards_seconds_median'] * 1e3:,.0f}",
        "its forwards": f"{row['baseline_forwards_seconds_median'] * 1e3:,.0f}",
    }


def _memory(row: Row) -> dict[str, str]:
    return {
        "peak MiB": f"{row['peak_memory_mib']:,.1f}",
        "extra MiB": f"{row['extra_memory_mib']:,.1f}",
        "of weights": f"{row['extra_memory_mib'] / row['weights_mib']:.2f}",
        "target": "\n".join(f"{t} {'met' if met else 'missed'}" for t, met in verdicts(row)),
    }


def _exact(row: Row) -> dict[str, str]:
    return {
        "restored, off by": "nothing" if row["restored_bits"] else f"{row['restored_relative_rms']:.1e}",
        "seeded by": row["peer_seeded_by"],
        "its noise": _noise(row),
    }


def _noise(row: Row) -> str:
    """What is wrong with it, if anything."""
    said = {"same_seed_same_bits": "does not repeat", "noise_differs": "equal for equal shapes"}
    if row["other_seed_other_bits"] is not None:
        said |= {"other_seed_other_bits": "no other for another seed", "seed_0_works": "not repeated by seed 0"}
    return ", ".join(text for name, text in said.items() if not row[name]) or "repeats"


def _loss(row: Row) -> dict[str, str]:
    sd = row["loss_after_sd"]
    return {
        "runs": str(row["runs"]),
        "steps": str(row["steps"]),
        "lr": f"{row['lr']:g}",
        "loss before": f"{row['loss_before']:.4f}",
        "after": f"{row['loss_after']:.4f}" + ("" if sd is None else f" ± {sd:.4f}"),
    }


_CELLS = {"time": _time, "memory": _memory, "exact": _exact, "loss": _loss}


def notes() -> list[str]:
    return [
        "Each peer has a process of its own, in which our steps are timed in turn with its steps. SPSA with one "
        "direction, fp32, weight decay 0, dropout off. Extra MiB: the peak of a step, less that of two forwards. "
        "Restored: how far a step with lr = 0 leaves the weights, RMS of it by RMS of them."
    ]
