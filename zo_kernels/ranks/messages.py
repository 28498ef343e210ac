"""Texts that ranks exchange (options, errors), and messages about ranks that differ."""

from __future__ import annotations

import builtins
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..weights.shards import is_sharded
from ..weights.tables import Weights


def named(ranks: Sequence[int]) -> str:
    """Name ranks: "rank 2", or "ranks 0-2 and 5"."""
    runs: list[list[int]] = []
    for r in ranks:
        if runs and runs[-1][1] == r - 1:
            runs[-1][1] = r
        else:
            runs.append([r, r])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(texts)


def differences(every: Sequence[Sequence[str] | None]) -> list[str]:
    """Describe the options that differ between ranks, given the texts "name: value" of each rank."""
    if any(texts is None for texts in every):
        return []
    values = [dict(text.partition(": ")[::2] for text in texts or ()) for texts in every]
    found = []
    for name in dict.fromkeys(name for of_rank in values for name in of_rank):
        each = [of_rank.get(name, "none") for of_rank in values]
        if len(set(each)) > 1:
            found.append(values_by_rank(f"{name}: ", each))
    return found if len(found) <= 5 else [*found[:5], f"and {len(found) - 5} more"]


def values_by_rank(what: str, values: Sequence[Any]) -> str:
    """Describe who has which value: "seed: 7 on rank 0, 8 on ranks 1-3"."""
    holders: dict[Any, list[int]] = {}
    for r, value in enumerate(values):
        holders.setdefault(value, []).append(r)
    return what + ", ".join(f"{value} on {named(ranks)}" for value, ranks in holders.items())


def packed(made: bytes | None, error: Exception | None) -> bytes:
    """Encode what rank 0 made, or the error that it met, as bytes that can be decoded safely."""
    if error is None:
        return b"none" if made is None else b"data" + made
    kind = next(t.__name__ for t in type(error).__mro__ if t.__module__ == "builtins")
    arguments: list[Any] = [str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        arguments = [error.errno, error.strerror, None if error.filename is None else str(error.filename)]
    return b"fail" + json.dumps([kind, arguments]).encode()


def unpacked(data: bytes) -> bytes | None:
    """Decode what `packed` encoded: return it, or raise the error."""
    tag, rest = data[:4], data[4:]
    if tag in (b"none", b"data"):
        return rest if tag == b"data" else None
    text = rest.decode(errors="replace")
    error: Exception = RuntimeError(f"rank 0: it failed with {text[:200]!r}")
    with suppress(ValueError, TypeError, RecursionError):
        name, arguments = json.loads(text)
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            error = kind(*arguments)
    raise error


def minority(values: Sequence[Any]) -> list[int]:
    """The ranks whose value is not the most frequent one; among equally frequent values, that of rank 0 wins."""
    counts = Counter(map(str, values))
    usual = max(map(str, values), key=lambda value: (counts[value], value == str(values[0])))
    return [i for i, value in enumerate(values) if str(value) != usual]


def options_of(settings: Mapping[str, Any], weights: Weights, names: Mapping[Tensor, str]) -> list[str]:
    """List what the optimizers of all ranks must have in common, as texts "name: value".

    Args:
        settings: the options and their values.
        names: the name of each parameter.
    """
    options = dict(settings)
    for w in weights.weights:
        how_sharded = f", {getattr(w.parameter, 'placements', '')}" if is_sharded(w.parameter) else ""
        exempt = ", no weight decay" if w.row % 2 else ""
        options[f"parameter {names[w.parameter]}"] = (
            f"{w.tensor.dtype} {w.shard.whole}{how_sharded} of group {w.row // 2}, block {w.block}, "
            f"noise {w.param_id}, threshold {w.threshold}{exempt}"
        )
    return [f"{name}: {value}" for name, value in options.items()]
