"""Checks MeZO-SVRG's part of a state that is being loaded. All is checked before anything is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..weights.shards import local


def check_svrg(zo: Mapping[str, Any], groups: int, blocks: int, steps: int) -> dict[str, Any]:
    """Check MeZO-SVRG's values in a state: its options, and the path from its anchor. Return them as own copies.

    Args:
        zo: what the state has under "zo", with all keys.
        groups: how many parameter groups there are.
        blocks: how many transformer blocks there are.
        steps: the state's step count.

    Raises:
        TypeError, ValueError: a value is invalid.
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
        "shared_direction": checks.boolean(f"{at}shared_direction", zo["shared_direction"]),
        "path": path,
        "path_decays": decays,
        "anchor_gradients": gradients,
        "anchor_ok": checks.boolean(f"{at}anchor_ok", zo["anchor_ok"]),
        "dropped": dropped,
        "age": age,
    }


def check_snapshot(name: str, given: Any, p: Tensor, *, same_dtype: bool) -> None:
    """Raise TypeError or ValueError unless `given` can be the snapshot of a parameter."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.shape != p.shape or hasattr(given, "to_local") != hasattr(p, "to_local"):
        raise ValueError(f"{name}: expected {_describe(p)}, as the parameter, got {_describe(given)}")
    if given.layout != torch.strided or given.is_meta or not given.is_floating_point():
        raise ValueError(f"{name}: expected a dense tensor of floats with data, got {_describe(given)}")
    if (same_dtype and given.dtype != p.dtype) or local(given).shape != local(p).shape:
        raise ValueError(f"{name}: expected {_describe(p)}, as the parameter, got {_describe(given)}")


def _number(name: str, value: Any) -> float:
    return checks.number(name, value, -checks.MAX_FLOAT32, checks.MAX_FLOAT32)


def _numbers(name: str, values: Any, n: int | None = None) -> list[float]:
    return [_number(f"{name}[{i}]", value) for i, value in enumerate(checks.sequence(name, values, n))]


def _by_seed(name: str, entries: Any) -> list[tuple[int, int, Any]]:
    """Return (index, seed, value) for each [seed, value] of a list, in which each seed may come once."""
    found, seen = [], set()
    for i, entry in enumerate(checks.sequence(name, entries)):
        seed, value = checks.sequence(f"{name}[{i}]", entry, 2)
        seed = checks.integer(f"{name}[{i}]: seed", seed, 0, checks.MAX_SEED)
        if seed in seen:
            raise ValueError(f"{name}[{i}]: expected each seed once, got {seed} again")
        seen.add(seed)
        found.append((i, seed, value))
    return found


def _describe(t: Tensor) -> str:
    dtype, layout = str(t.dtype).removeprefix("torch."), str(t.layout).removeprefix("torch.")
    kind = "" if layout == "strided" else f"{layout} "
    here = f" (here {tuple(local(t).shape)})" if hasattr(t, "to_local") else ""
    return f"{kind}{dtype} of shape {tuple(t.shape)}{here} on {t.device}"
