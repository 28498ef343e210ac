"""What a user may give an optimizer, checked: parameter groups, blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from .. import checks, names
from .blocks import find_blocks

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)

# What PyTorch, schedulers and logs write into groups, so that groups of a run that was begun may have them.
_OF_OTHERS = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale")


def check_keys(group: Mapping[str, Any], options: Collection[str], where: str) -> None:
    """Raise ValueError if a group that a user gives has what is no option, and would be left alone without a word.

    Args:
        options: those that a group of the method may have.
    """
    for key in group:
        if key in options or key in _OF_OTHERS:
            continue
        near = get_close_matches(str(key), options, 1)
        meant = f", which is {near[0]!r} perhaps" if near else ""
        raise ValueError(
            f"{where}expected options of this optimizer ({', '.join(options)}), got {key!r}{meant} (what is for "
            "others, such as a scheduler, can be written into param_groups later)"
        )


def check_group(group: dict[str, Any], where: str) -> None:
    """Raise TypeError or ValueError unless the options of a parameter group can be used."""
    checks.number(f"{where}lr", group["lr"], 0.0)
    check_eps(f"{where}eps", group["eps"])
    checks.number(f"{where}weight_decay", group["weight_decay"], 0.0)
    checks.number(f"{where}sparsity", group["sparsity"], 0.0, 1.0, open_high=True)


def check_eps(name: str, eps: Any) -> float:
    """eps as a float above 0."""
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
    """Give the parameters of a group that is to be added their names in the module, as those of the first groups have
    them. Those that are not the module's are called what they were given, or something that is not in `known`.
    """
    given = group.get("params")
    if isinstance(given, set) or not isinstance(given, Iterable):
        return  # torch refuses what is no tensor then
    every = [given] if isinstance(given, Tensor) else list(given)  # it may be read once only
    own, taken = names.of_module(module), set(known.values())
    for i, item in enumerate(every):
        name, p = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if isinstance(p, Tensor):
            every[i] = own.get(p) or name or names.free(str(len(known) + i), taken), p
    group["params"] = every


def check_owned(group: dict[str, Any], module: nn.Module, where: str) -> None:
    """Raise ValueError if a group that was named has a parameter that is not the module's."""
    own, given = {id(p) for p in module.parameters()}, group.get("params")
    for item in given if isinstance(given, list) else []:
        if isinstance(item, tuple) and id(item[1]) not in own:
            raise ValueError(
                f"{where}params: expected parameters of the module, for perturb='in_forward', got {item[0]}"
            )


def norm_parameters(module: nn.Module | None) -> set[Tensor]:
    """The parameters of normalisation layers, which weight decay leaves alone."""
    if module is None:
        return set()
    return {p for m in module.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}


def given_blocks(module: nn.Module | None, blocks: Sequence[nn.Module] | None, drop: float) -> Sequence[nn.Module]:
    """The transformer blocks that were named, or that the module has, if they matter.

    Raises:
        TypeError, ValueError: they are no modules, or cannot be found.
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
        raise ValueError("drop: the blocks of bare parameters are unknown; give the module first, or blocks=")
    return find_blocks(module)
