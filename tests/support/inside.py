"""All that tests know of an optimizer's insides: what no public name tells, and what stands in for a GPU.

A change of how an optimizer is made up is followed here, and nowhere else in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.closures import losses
from zo_kernels.estimators.protocol import Losses
from zo_kernels.perturbation import engine, in_forward
from zo_kernels.perturbation.in_forward import InForward
from zo_kernels.perturbation.reads.watch import Watch
from zo_kernels.runs import graphed, recording
from zo_kernels.runs.attempt import Attempt
from zo_kernels.runs.run import VISIT
from zo_kernels.weights.tables import Weights

Optimizer = zo.ZeroOrderOptimizer


# What an optimizer has.


def tables_of(opt: Optimizer) -> Weights:
    """The table of its weights, which was built for its last step."""
    tables = opt._trained.weights
    assert tables is not None
    return tables


def stored_masks_of(opt: Optimizer) -> list[Tensor]:
    """The bits that were kept of which weights take part."""
    return [t for t in tables_of(opt)._bits if t is not None]


def in_forward_of(opt: Optimizer) -> Any:
    """What perturbs its weights in the forward."""
    place = opt._perturbation.place
    assert isinstance(place, InForward)
    return place.engine


def buffer_bytes_of(opt: Optimizer) -> int:
    """Of the memory for perturbed copies of weights."""
    return sum(chunk.numel() for chunk in in_forward_of(opt)._scratch.chunks)


def tables_in_forward_of(opt: Optimizer) -> int:
    """How many tables were made of parts of the module."""
    return len(in_forward_of(opt)._tables)


def owners_of(opt: Optimizer) -> dict[nn.Module, Any]:
    """The modules that own the weights which are perturbed in the forward."""
    return dict(in_forward_of(opt)._owners.owned)


def recording_of(opt: Optimizer) -> Any:
    """What writes its trajectory."""
    return opt._run.recording


def evaluation_of(opt: Optimizer) -> int:
    """Which evaluation of its step this is, from 1 on."""
    progress = opt._run.progress
    assert progress is not None and progress.probes is not None
    return progress.probes.moves


def parallel_of(opt: Optimizer) -> zo.Parallel:
    """As which it was made, or "auto" came to."""
    assert opt._ranks is not None
    return opt._ranks.how


def channel_of(opt: Optimizer) -> Any:
    """What its rank sends with."""
    assert opt._ranks is not None
    return opt._ranks._channel


def agreed_of(opt: Optimizer) -> list[str]:
    """What ranks compare before a step, as texts."""
    assert opt._ranks is not None
    return [str(opt._ranks._digest), *opt._run.agreed(opt.param_groups)]


def attributes_of(opt: Optimizer) -> dict[Any, Any]:
    """Those of the optimizer and of its parts, but the note of which thread is in it."""
    parts = {"": opt, "run": opt._run, "trained": opt._trained, "estimator": opt._estimator}
    return {(part, k): v for part, it in parts.items() for k, v in it.__dict__.items() if k != VISIT}


def versions_of(opt: Optimizer) -> Any:
    """PyTorch's counts of changes that the optimizer remembers, by which it notices those of others."""
    return opt._run.recording._versions


def forget_anchor(opt: Optimizer) -> None:
    """As MeZO-SVRG does if its anchor is one of other weights."""
    opt._estimator.forget()


# What is put in its place.

Patch = pytest.MonkeyPatch


def losses_stay(patch: Patch, stay: bool = True) -> None:
    """Tensors of losses are taken for some on a GPU, or not."""
    patch.setattr(losses, "stays_on_device", lambda loss: stay)


def graphs_here(patch: Patch, captured: Callable[..., Any] | None = None) -> None:
    """Steps can be captured on a CPU; by what, if that is given."""
    patch.setattr(graphed, "has_graphs", lambda where: True)
    if captured is not None:
        patch.setattr(graphed, "captured", captured)


def check_every(patch: Patch, steps: int) -> None:
    """A trajectory notes a fingerprint of the weights each so many steps."""
    patch.setattr(recording, "CHECK_EVERY", steps)


def watched_steps(patch: Patch, chosen: Callable[[int], bool]) -> None:
    """Which steps look for reads that nothing points to."""
    patch.setattr(in_forward, "is_sampled", lambda seed, step: chosen(step))


def watches(patch: Patch) -> list[Watch]:
    """The evaluations that were watched for reads elsewhere from now on."""
    made: list[Watch] = []

    def noted(*arguments: Any) -> Watch:
        made.append(Watch(*arguments))
        return made[-1]

    patch.setattr(engine, "Watch", noted)
    return made


def watch_the_next(opt: Optimizer) -> None:
    """The next evaluation of this step is watched."""
    in_forward_of(opt).watch_policy._left = 1


def fails_before_a_step(patch: Patch, opt: Optimizer, fails: Callable[..., Any]) -> None:
    """Where it is asked for a step's numbers, before anything is done."""
    patch.setattr(opt, "_begin", fails)


def fails_after_the_update(patch: Patch, opt: Optimizer, fails: Callable[..., Any]) -> None:
    """Where what a step returns is computed."""
    patch.setattr(Losses, "mean", fails)


def fails_in_putting_back(patch: Patch, fails: Callable[..., Any]) -> None:
    """Where an exception that leaves a step is dealt with."""
    patch.setattr(Attempt, "__exit__", fails)


def fails_in_tables(patch: Patch, fails: Callable[..., Any]) -> None:
    """Where the table of weights is built."""
    patch.setattr(Weights, "__init__", fails)


def fails_in_finding_owners(patch: Patch, fails: Callable[..., Any]) -> None:
    """Where it is looked for which modules own the weights."""
    patch.setattr("zo_kernels.perturbation.owners.Owners._find_again", fails)
