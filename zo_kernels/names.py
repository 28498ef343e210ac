"""Parameter ids from names, so that freezing, reordering or wrapping a model changes no parameter's noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_MOST_ATTEMPTS = 8  # of one name to find a 32-bit hash that no other name has
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2s(name.encode()).digest()[:4], "little")


def strip_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Each name -> the name without the parts that torch.compile, FSDP, checkpointing and data parallelism add.

    A leading `module` counts as a wrapper only if every name has it. If two names would become equal, none is changed.
    """
    bare = {n: ".".join(part for part in n.split(".") if part not in _WRAPPERS) for n in names}
    while bare and all(b.startswith("module.") for b in bare.values()):
        bare = {n: b.removeprefix("module.") for n, b in bare.items()}
    return bare if len(set(bare.values())) == len(bare) else {n: n for n in bare}


def param_ids(names: Iterable[str]) -> dict[str, int]:
    """Each name -> its 32-bit id (docs/noise.md, 6). Give the names of all parameters, frozen ones too."""
    ids: dict[str, int] = {}
    taken: set[int] = set()
    for bare, name in sorted((bare, name) for name, bare in strip_wrappers(names).items()):
        candidate, attempt = _hash(bare), 0
        while candidate in taken:
            attempt += 1
            candidate = _hash(f"{bare}#{attempt}")
        taken.add(candidate)
        ids[name] = candidate
    return ids


def may_have(bare: str, param_id: int) -> bool:
    """Whether a parameter of this name can have this id. It has one of a few, which depends on the other names."""
    return any(param_id == _hash(f"{bare}#{attempt}" if attempt else bare) for attempt in range(_MOST_ATTEMPTS))


def of_module(module: nn.Module) -> dict[Tensor, str]:
    """Each parameter of a module, frozen ones too -> its name.

    A tied parameter has several names. It gets the smallest, which does not depend on the order of registration.
    """
    every: dict[Tensor, str] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    bare = strip_wrappers(name for name, _ in named)
    for name, p in named:
        every[p] = min(every.get(p, name), name, key=lambda n: (bare[n], n))
    return every


def bare(named: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """Each parameter -> its name without the parts that wrappers add."""
    stripped = strip_wrappers(named.values())
    return {p: stripped[name] for p, name in named.items()}


def add_group(every: dict[Tensor, str], group: Mapping[str, Any]) -> None:
    """Add the parameters of an optimizer's group to `every`, by the names given there or else by position."""
    given, taken = group.get("param_names"), set(every.values())
    for i, p in enumerate(group["params"]):
        if p not in every:
            every[p] = free(given[i] if given else str(len(every)), taken)


def listed(every: Sequence[str], most: int = 5) -> str:
    """The first `most` names as text, and how many more there are."""
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def free(name: str, taken: set[str]) -> str:
    """The name, with primes behind it if it is taken (two models in one optimizer). It is taken from then on."""
    while name in taken:
        name += "'"
    taken.add(name)
    return name
