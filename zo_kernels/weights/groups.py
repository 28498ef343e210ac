"""Checks of what a user gives an optimizer: parameter groups, eps, blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from .. import checks, names
from .blocks import find_blocks

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)

# PyTorch, schedulers and loggers write these into groups, so groups taken from an earlier run may have them.
_FOREIGN_KEYS = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale")


def check_keys(group: Mapping[str, Any], options: Collection[str], where: str) -> None:
    """Raise ValueError if a user's group has a key that is no option: it would have no effect, and nobody would notice.

    Args:
        options: the keys that a group of this method may have.
    """
    for key in group:
        if key in options or key in _FOREIGN_KEYS:
            continue
        near = get_close_matches(str(key), options, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{where}expected options of this optimizer ({', '.join(options)}), got {key!r}{hint} (a scheduler's own "
            "keys can be written into param_groups later)"
        )


def check_group(group: dict[str, Any], where: str) -> None:
    """Raise TypeError or ValueError unless the options of a parameter group are valid."""
    checks.number(f"{where}lr", group["lr"], 0.0)
    check_eps(f"{where}eps", group["eps"])
    checks.number(f"{where}weight_decay", group["weight_decay"], 0.0)
    checks.number(f"{where}sparsity", group["sparsity"], 0.0, 1.0, open_high=True)


def check_eps(name: str, eps: Any) -> float:
    """Return eps as a float above 0; raise TypeError or ValueError if it is none."""
    return checks.number(name, eps, checks.MIN_FLOAT32, checks.MAX_FLOAT32)


def eps_of(groups: Sequence[Mapping[str, Any]]) -> float:
    """ε, which all groups share."""
    values = {group["eps"] for group in groups}
    if len(values) != 1:
        raise ValueError(f"eps: expected one value for all groups, got {sorted(values)}")
    return check_eps("eps", values.pop())


def rates_of(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """The learning rate of each row of scales: two rows a group."""
    return [checks.number("lr", group["lr"], 0.0) for group in groups for _ in range(2)]


def weight_decays_of(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """The weight decay of each row: odd rows are exempt."""
    decays = [checks.number("weight_decay", group["weight_decay"], 0.0) for group in groups]
    return [w for decay in decays for w in (decay, 0.0)]


def name_group(group: dict[str, Any], module: nn.Module, known: Mapping[Tensor, str]) -> None:
    """Name the parameters of a group that is about to be added; changes `group["params"]` to (name, parameter) pairs.

    A parameter of the module gets its name there. Any other keeps the name that the user gave it, or gets a new one
    that is not in `known`.
    """
    given = group.get("params")
    if isinstance(given, set) or not isinstance(given, Iterable):
        return  # torch refuses it
    every = [given] if isinstance(given, Tensor) else list(given)  # it may be an iterator
    own, taken = names.of_module(module), set(known.values())
    for i, item in enumerate(every):
        name, p = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if isinstance(p, Tensor):
            every[i] = own.get(p) or name or names.free(str(len(known) + i), taken), p
    group["params"] = every


def check_owned(group: dict[str, Any], module: nn.Module, where: str) -> None:
    """Raise ValueError if a group, after `name_group`, has a parameter that is not the module's."""
    own, given = {id(p) for p in module.parameters()}, group.get("params")
    for item in given if isinstance(given, list) else []:
        if isinstance(item, tuple) and id(item[1]) not in own:
            raise ValueError(
                f"{where}params: expected parameters of the module, which perturb='in_forward' needs, got {item[0]}"
            )


def norm_parameters(module: nn.Module | None) -> set[Tensor]:
    """The parameters of normalisation layers, which are exempt from weight decay."""
    if module is None:
        return set()
    return {p for m in module.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}


def resolve_blocks(module: nn.Module | None, blocks: Sequence[nn.Module] | None, drop: float) -> Sequence[nn.Module]:
    """Return the transformer blocks: those in `blocks`, or those found in the module if `drop` needs them, or none.

    Raises:
        TypeError: `blocks` has an entry that is no module.
        ValueError: `blocks` is empty, or `drop` needs blocks and none can be found.
    """
    if blocks is not None:
        found = checks.sequence("blocks", list(blocks) if isinstance(blocks, nn.ModuleList) else blocks)
        for i, block in enumerate(found):
            if not isinstance(block, nn.Module):
                raise TypeError(f"blocks[{i}]: expected a module, got {type(block).__name__}")
        if not found:
            raise ValueError("blocks: expected at least one module, got none")
        return found
    if drop == 0.0:
        return []
    if module is None:
        raise ValueError(
            "drop: expected a module to find the blocks in, got bare parameters; give the module first, or blocks="
        )
    return find_blocks(module)
