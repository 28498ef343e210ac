"""Saves the state of a run, and loads one: all of it is checked before anything of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import checks, spec
from ..estimators.draws import MAX_DIRECTIONS
from ..interrupts import signals_held
from ..trajectory.setups import MASKS
from ..weights import kept as masks
from ..weights.groups import check_group
from ..weights.kept import MASK
from ..weights.masks import Thresholds
from ..weights.overflow import Reach
from ..weights.shards import local
from ..weights.trained import every_parameter, trainable
from .run import Groups, Kept, Run

VERSION = 1  # of the part of a state under "zo"; a state without a version has this one
# Keys that states of earlier versions do not have.
_LATER = (
    *("version", "distribution", "mask", "estimator", "normalize", "rms"),
    *("anneal", "anneal_above", "annealed", "anchor_loss"),
)
_MAX_STEPS = 2**44 - 1  # the noise has no directions for more steps (docs/noise.md, 6)


def check_run(zo: Any, ours: Mapping[str, Any], names: Sequence[str], blocks: int) -> dict[str, Any]:
    """Check the part of `state_dict()["zo"]` that all methods have, and return it as own copies.

    Args:
        zo: the part under "zo" of the state that is being loaded.
        ours: the same part of the optimizer's own state, which has all keys and ids.
        names: of the optimizer's parameters.
        blocks: how many transformer blocks the optimizer has.

    Raises:
        TypeError, ValueError: the state is of another method, model or version, or a value in it is invalid.
    """
    zo, at = checks.mapping("state_dict: zo", zo), "state_dict: zo."
    version = checks.integer(f"{at}version", zo.get("version", VERSION), 1)
    if version > VERSION:
        raise ValueError(
            f"{at}version: expected at most {VERSION}, got {version}: the state was made by a newer zo_kernels; update "
            "this one"
        )
    for key in ("method", "noise"):
        if type(zo.get(key)) is not str or zo[key] != ours[key]:
            raise ValueError(f"{at}{key}: expected {ours[key]!r}, got {zo.get(key)!r}")
    if absent := [key for key in ours if key not in zo and key not in _LATER]:
        raise ValueError(f"{at}{absent[0]}: expected a value, got none")
    if unknown := [key for key in zo if key not in ours]:
        raise ValueError(f"state_dict: zo: expected {', '.join(ours)}, got also {unknown[0]!r}")
    ids = checks.sequence(f"{at}param_ids", zo["param_ids"])
    if len(ids) != len(names):
        raise ValueError(
            f"{at}param_ids: expected {len(names)} entries, one for each parameter, got {len(ids)}: it is the state of "
            "another model's optimizer"
        )
    for name, expected, got in zip(names, ours["param_ids"], ids, strict=True):
        if type(got) is not int or got != expected:
            raise ValueError(f"{at}param_ids: expected {expected!r} for {name}, got {got!r}: it has other names")
    thresholds = checks.sequence(f"{at}thresholds", zo["thresholds"], len(names))
    steps = checks.integer(f"{at}step_count", zo["step_count"], 0, _MAX_STEPS)
    drop = checks.number(f"{at}drop", zo["drop"], 0.0, 1.0, open_high=True)
    if drop and not blocks:
        raise ValueError(f"{at}drop: expected 0, as of an optimizer that was made without drop= or blocks=, got {drop}")
    return {
        "seed": checks.integer(f"{at}seed", zo["seed"], 0, checks.MAX_SEED),
        "step_count": steps,
        "refused_steps": checks.integer(f"{at}refused_steps", zo["refused_steps"], 0, steps),
        "directions": checks.integer(f"{at}directions", zo["directions"], 1, MAX_DIRECTIONS),
        "drop": drop,
        "distribution": checks.choice(f"{at}distribution", zo.get("distribution", "normal"), spec.DISTRIBUTIONS),
        "mask": checks.choice(f"{at}mask", zo.get("mask", "redrawn"), MASKS),
        "thresholds": [
            None if h is None else checks.number(f"{at}thresholds[{i}]", h, 0.0, checks.MAX_FLOAT32)
            for i, h in enumerate(thresholds)
        ],
    }


def check_torch(
    given: Any,
    groups: Sequence[Mapping[str, Any]],
    check_more: Callable[[Mapping[str, Any], str], None],
) -> dict[Tensor, tuple[str, Mapping[Any, Any]]]:
    """Check the part of a state that PyTorch's optimizers have. Unknown keys are left alone: hooks may have added them.

    Args:
        given: the state that is being loaded.
        groups: the optimizer's parameter groups.
        check_more: called with each group of the state, and with its name for messages.

    Returns:
        For each parameter with an entry under "state": the entry's name for messages, and the entry.

    Raises:
        TypeError, ValueError: a value is invalid, or does not fit the optimizer.
    """
    given = checks.mapping("state_dict", given)
    for key in ("state", "param_groups"):
        if key not in given:
            raise ValueError(f"state_dict: {key}: expected a value, got none")
    at = "state_dict: param_groups"
    reach = Reach.of({p.dtype for group in groups for p in group["params"] if p.requires_grad})
    by_id: dict[Any, Tensor] = {}
    for i, (own, group) in enumerate(zip(groups, checks.sequence(at, given["param_groups"], len(groups)), strict=True)):
        where = f"{at}[{i}]."
        group = checks.mapping(where[:-1], group)
        for key in ("params", "lr", "eps", "weight_decay", "decay_all", "sparsity"):
            if key not in group:
                raise ValueError(f"{where}{key}: expected a value, got none")
        for p, key in zip(
            own["params"], checks.sequence(f"{where}params", group["params"], len(own["params"])), strict=True
        ):
            if not isinstance(key, Hashable) or key in by_id:
                raise ValueError(f"{where}params: expected each parameter once, got {key!r} again")
            by_id[key] = p
        check_group(dict(group), where)
        try:
            reach.check_eps(group["eps"])
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        checks.boolean(f"{where}decay_all", group["decay_all"])
        check_more(group, where)
    kept: dict[Tensor, tuple[str, Mapping[Any, Any]]] = {}
    for key, entry in checks.mapping("state_dict: state", given["state"]).items():
        if key not in by_id:
            raise ValueError(f"state_dict: state: expected entries of parameters in param_groups, got one of {key!r}")
        name = f"state_dict: state[{key!r}]"
        kept[by_id[key]] = name, checks.mapping(name, entry)
    return kept


def whole(run: Run, of_torch: dict[str, Any], groups: Groups, kept: Kept) -> dict[str, Any]:
    """Return what `state_dict()` returns; `of_torch` is what PyTorch's returns."""
    return {**masks.saved(of_torch, groups, run.trained.names), "zo": saved(run, groups, kept)}


def saved(run: Run, groups: Groups, kept: Kept) -> dict[str, Any]:
    """Return what `state_dict()` has under "zo"."""
    parameters = every_parameter(groups)
    return {
        "version": VERSION,
        "method": run.method,
        "noise": spec.VERSION,
        "seed": run.seed,
        "step_count": run.steps,
        "refused_steps": run.refused_steps,
        "directions": run.directions,
        "drop": run.trained.drop,
        "distribution": run.trained.distribution,
        "mask": run.trained.mask,
        "param_ids": [run.trained.ids[p] for p in parameters],
        "thresholds": [run.trained.thresholds.get(p) for p in parameters],
        **run.estimator.state(groups, kept),
    }


def checked(run: Run, zo: Any, groups: Groups, kept: Kept) -> dict[str, Any]:
    """Check what a state has under "zo"; return what `take` needs.

    Raises:
        TypeError, ValueError: a value is invalid, or does not fit the optimizer.
    """
    trained = run.trained
    names = [trained.names[p] for p in every_parameter(groups)]
    found = check_run(zo, saved(run, groups, kept), names, trained.n_blocks)
    if run.ranks is not None:
        run.ranks.check_directions(found["directions"])
    return found | run.estimator.check_state(zo, len(groups), trained.n_blocks, found["step_count"])


def take(run: Run, found: Mapping[str, Any], groups: Groups, kept: Kept) -> bool:
    """Take a checked state; return whether θ must be rewritten from it before the next step."""
    trained = run.trained
    run.seed, run.steps, run.directions = found["seed"], found["step_count"], found["directions"]
    trained.drop, trained.distribution, trained.mask = found["drop"], found["distribution"], found["mask"]
    for p, bits in found["masks"].items():
        kept[p][MASK] = bits
    run.refused_steps = found["refused_steps"]
    trained.thresholds = Thresholds.of_state(run.warner, every_parameter(groups), found)
    trained.weights = run.progress = None
    return run.estimator.load_state(found, groups, kept)


def load(
    run: Run,
    optimizer: torch.optim.Optimizer,
    given: Any,
    load_torch: Callable[[Any], None],
) -> None:
    """Load a state; see `ZeroOrderOptimizer.load_state_dict`.

    Args:
        run, optimizer: what the state is loaded into.
        given: the state.
        load_torch: PyTorch's own `load_state_dict`.
    """
    if "zo" not in checks.mapping("state_dict", given):
        raise ValueError("state_dict: expected the state of a zeroth-order optimizer, got one without 'zo'")
    zo, given = given["zo"], {key: value for key, value in given.items() if key != "zo"}
    hooks = optimizer.__dict__.get("_optimizer_load_state_dict_pre_hooks", {})
    for hook in hooks.values():  # call them here, since PyTorch would call them after the state was checked
        if (changed := hook(optimizer, given)) is not None:
            given = changed
    groups = optimizer.param_groups
    found = checked(run, zo, groups, optimizer.state)
    kept = check_torch(given, groups, run.estimator.check_group)
    run.estimator.check_kept(kept, found, groups, run.trained.names)
    heights = found["thresholds"] if found["mask"] == "kept" and found["step_count"] else []
    found["masks"] = masks.checked(kept, every_parameter(groups)[: len(heights)], heights, run.trained.names)
    with _undone_on_error(run, optimizer):
        optimizer._optimizer_load_state_dict_pre_hooks = type(hooks)()
        load_torch(masks.without(given))
        optimizer._optimizer_load_state_dict_pre_hooks = hooks
        writes_theta = take(run, found, optimizer.param_groups, optimizer.state)
        if run.estimator.can_rewrite_theta:  # from here on the state has the anchors of all that is trained
            _prepare(run, optimizer, writes_theta)
        run.recording.forget_versions()  # the model's weights may be loaded after this


def _prepare(run: Run, optimizer: torch.optim.Optimizer, writes_theta: bool) -> None:
    """Build tables, and let the estimator write θ from the loaded state. If that fails, put θ back."""
    written = trainable(optimizer.param_groups) if writes_theta else []
    theta = [(t, t.detach().clone()) for t in map(local, written)]
    try:
        run.prepare(optimizer.param_groups, optimizer.state)
    except BaseException:
        with torch.no_grad(), signals_held():
            for t, values in theta:
                t.copy_(values)
        raise


@contextmanager
def _undone_on_error(run: Run, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """If the block raises, put back all attributes of the optimizer and of its parts."""
    weights, recording = run.trained.weights, run.recording
    ours = weights is not None and not recording.changed_by_others(weights)
    before = [
        (part.__dict__, dict(part.__dict__)) for part in (optimizer, run, run.trained, run.perturbation, run.estimator)
    ]
    versions = recording.forget_versions()
    try:
        yield
    except BaseException:
        with signals_held():
            for now, then in before:
                for key in now.keys() - then.keys():
                    del now[key]
                now.update(then)
            recording.restore_versions(versions)
            if weights is not None and versions is not None and ours:  # θ is the same again, with other versions
                recording.note_versions(weights)
        raise
