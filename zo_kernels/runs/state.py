"""What a state that is loaded must be: all of it is checked before anything of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..estimators.draws import MAX_DIRECTIONS
from ..weights.groups import check_group
from ..weights.overflow import Reach
from ..weights.shards import local

VERSION = 1  # of what is under "zo"; a state without one is of this version
_MAX_STEPS = 2**44 - 1  # the noise has directions for them (docs/noise.md, 6)


def mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """value, which must be a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a dictionary, got {type(value).__name__}")
    return value


def boolean(name: str, value: Any) -> bool:
    """value, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")
    return value


def check_run(zo: Any, ours: Mapping[str, Any], names: Sequence[str], blocks: int) -> dict[str, Any]:
    """What `state_dict()["zo"]` of every optimizer has, as values that are nobody else's.

    Args:
        ours: the same of the optimizer that it is loaded into.
        names: of its parameters.
        blocks: how many transformer blocks it knows.

    Raises:
        TypeError, ValueError: it is not the like of ours, or of another version.
    """
    zo, at = mapping("state_dict: zo", zo), "state_dict: zo."
    version = checks.integer(f"{at}version", zo.get("version", VERSION), 1)
    if version > VERSION:
        raise ValueError(
            f"{at}version: expected at most {VERSION}, got {version}: the state was made by a newer zo_kernels; update "
            "this one"
        )
    for key in ("method", "noise"):
        if type(zo.get(key)) is not str or zo[key] != ours[key]:
            raise ValueError(f"{at}{key}: expected {ours[key]!r}, got {zo.get(key)!r}")
    if absent := [key for key in ours if key not in zo and key != "version"]:
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
        "thresholds": [
            None if h is None else checks.number(f"{at}thresholds[{i}]", h, 0.0, checks.MAX_FLOAT32)
            for i, h in enumerate(thresholds)
        ],
    }


def check_svrg(zo: Mapping[str, Any], groups: int, blocks: int, steps: int) -> dict[str, Any]:
    """What MeZO-SVRG has besides: the way from its anchor.

    Args:
        zo: with all its keys.
        groups: parameter groups.
        blocks: transformer blocks.
        steps: its step count.
    """
    at = "state_dict: zo."
    decays = _numbers(f"{at}path_decays", zo["path_decays"])
    if len(decays) % 2 or len(decays) > 2 * groups:
        raise ValueError(f"{at}path_decays: expected two for each of {groups} groups, got {len(decays)}")
    if (age := zo["age"]) is not None:
        checks.integer(f"{at}age", age, 0, steps)
        if not decays:
            raise ValueError(f"{at}path_decays: expected some, at age {age}, got none")
    path = {seed: _numbers(f"{at}path[{i}]", row, len(decays)) for i, seed, row in _by_seed(f"{at}path", zo["path"])}
    gradients = {
        seed: _number(f"{at}anchor_gradients[{i}]", g)
        for i, seed, g in _by_seed(f"{at}anchor_gradients", zo["anchor_gradients"])
    }
    dropped = checks.sequence(f"{at}dropped", zo["dropped"])
    dropped = [checks.integer(f"{at}dropped[{i}]", block, 0, blocks - 1) for i, block in enumerate(dropped)]
    if len(set(dropped)) < len(dropped):
        raise ValueError(f"{at}dropped: expected each block once, got {dropped}")
    if age is not None:
        if not gradients:
            raise ValueError(f"{at}anchor_gradients: expected some, at age {age}, got none")
        if lacking := [seed for seed in gradients if seed not in path]:
            raise ValueError(
                f"{at}path: expected all seeds of anchor_gradients, at age {age}, got none of {lacking[0]}"
            )
    return {
        "anchor_every": checks.integer(f"{at}anchor_every", zo["anchor_every"], 1),
        "shared_direction": boolean(f"{at}shared_direction", zo["shared_direction"]),
        "path": path,
        "path_decays": decays,
        "anchor_gradients": gradients,
        "anchor_ok": boolean(f"{at}anchor_ok", zo["anchor_ok"]),
        "dropped": dropped,
        "age": age,
    }


def _number(name: str, value: Any) -> float:
    return checks.number(name, value, -checks.MAX_FLOAT32, checks.MAX_FLOAT32)


def _numbers(name: str, values: Any, n: int | None = None) -> list[float]:
    return [_number(f"{name}[{i}]", value) for i, value in enumerate(checks.sequence(name, values, n))]


def _by_seed(name: str, entries: Any) -> list[tuple[int, int, Any]]:
    """(place, seed, value) of a list of [seed, value]."""
    found, seen = [], set()
    for i, entry in enumerate(checks.sequence(name, entries)):
        seed, value = checks.sequence(f"{name}[{i}]", entry, 2)
        seed = checks.integer(f"{name}[{i}]: seed", seed, 0, checks.MAX_SEED)
        if seed in seen:
            raise ValueError(f"{name}[{i}]: expected each seed once, got {seed} again")
        seen.add(seed)
        found.append((i, seed, value))
    return found


def check_torch(
    given: Any,
    groups: Sequence[Mapping[str, Any]],
    check_more: Callable[[Mapping[str, Any], str], None],
) -> dict[Tensor, tuple[str, Mapping[Any, Any]]]:
    """What every `torch.optim.Optimizer` has in its state; keys of others in it are theirs.

    Args:
        given: the state.
        groups: of the optimizer that it is loaded into.
        check_more: called with each group that is given, and what to call it.

    Returns:
        For each parameter with an entry under "state" what to call that, and the entry.
    """
    given = mapping("state_dict", given)
    for key in ("state", "param_groups"):
        if key not in given:
            raise ValueError(f"state_dict: {key}: expected a value, got none")
    at = "state_dict: param_groups"
    reach = Reach.of({p.dtype for group in groups for p in group["params"] if p.requires_grad})
    by_id: dict[Any, Tensor] = {}
    for i, (own, group) in enumerate(zip(groups, checks.sequence(at, given["param_groups"], len(groups)), strict=True)):
        where = f"{at}[{i}]."
        group = mapping(where[:-1], group)
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
        boolean(f"{where}decay_all", group["decay_all"])
        check_more(group, where)
    kept: dict[Tensor, tuple[str, Mapping[Any, Any]]] = {}
    for key, entry in mapping("state_dict: state", given["state"]).items():
        if key not in by_id:
            raise ValueError(f"state_dict: state: expected entries of parameters in param_groups, got one of {key!r}")
        name = f"state_dict: state[{key!r}]"
        kept[by_id[key]] = name, mapping(name, entry)
    return kept


def check_snapshot(name: str, given: Any, p: Tensor, *, same_dtype: bool) -> None:
    """Raise TypeError or ValueError unless `given` can be the snapshot of a parameter."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.shape != p.shape or hasattr(given, "to_local") != hasattr(p, "to_local"):
        raise ValueError(f"{name}: expected {_told(p)}, as the parameter, got {_told(given)}")
    if given.layout != torch.strided or given.is_meta or not given.is_floating_point():
        raise ValueError(f"{name}: expected a dense tensor of floats with data, got {_told(given)}")
    if (same_dtype and given.dtype != p.dtype) or local(given).shape != local(p).shape:
        raise ValueError(f"{name}: expected {_told(p)}, as the parameter, got {_told(given)}")


def _told(t: Tensor) -> str:
    dtype, layout = str(t.dtype).removeprefix("torch."), str(t.layout).removeprefix("torch.")
    kind = "" if layout == "strided" else f"{layout} "
    here = f" (here {tuple(local(t).shape)})" if hasattr(t, "to_local") else ""
    return f"{kind}{dtype} of shape {tuple(t.shape)}{here} on {t.device}"
