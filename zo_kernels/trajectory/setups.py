"""Setups: what holds for all steps until the next one, as text and back, and what each field may be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .. import checks

MAX_TEXT = 2**25  # bytes of a setup: about 150,000 weights
MAX_DIRECTIONS = 2**16
MAX_STEP = 2**44 - 1  # more does not fit the draws
_MAX_BLOCKS = 2**16
_MAX_DIMENSIONS = 1000
_MAX_GROUPS = 2**20
_MAX_NAME = 2**12
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES)
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class WeightSetup:
    """A trainable parameter; see `optim.weights.Weight`. `fingerprint` is of its value when the setup was made."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    param_id: int
    row: int
    block: int | None
    threshold: float | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Setup:
    """All that rebuilds steps and does not change from one to the next.

    Args:
        method: class of the optimizer.
        noise: version.
        step: steps taken before.
        continues: whether the weights are those that the records before lead to (or the first ones).
        seed, directions, eps, drop: of the optimizer; `blocks` is the number of transformer blocks.
        in_place: perturbation in place, which rounds on its way.
        stochastic: rounding.
        weight_decays: for each parameter group.
        svrg: whether the steps are MeZO-SVRG's. Of these,
        shared_direction: the option, and
        anchored: whether an anchor is in use that an earlier record took.
        weights: in the order of the passes.
    """

    method: str
    noise: str
    step: int
    continues: bool
    seed: int
    directions: int
    eps: float
    drop: float
    blocks: int
    in_place: bool
    stochastic: bool
    weight_decays: tuple[float, ...]
    svrg: bool
    shared_direction: bool
    anchored: bool
    weights: tuple[WeightSetup, ...]


_LEAST_FIELDS = len(fields(WeightSetup))


def as_text(setup: Setup) -> bytes:
    """Of a setup that will be read again.

    Raises:
        TypeError, ValueError: it would not; the message names the field.
    """
    check(setup)
    text = json.dumps(asdict(setup), separators=(",", ":")).encode()
    if len(text) > MAX_TEXT:
        raise ValueError(f"trajectory: expected at most {MAX_TEXT} bytes of names and options, got {len(text)}")
    return text


def from_text(text: bytes) -> Setup:
    """The setup; `check` has not seen it.

    Raises:
        TypeError, ValueError: it is none.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"expected at most {MAX_TEXT} bytes, got {len(text)}")
    given = _fields("setup", loaded(text), Setup)
    weights = [_fields(f"weights[{i}]", w, WeightSetup) for i, w in enumerate(_listed("weights", given["weights"]))]
    for i, w in enumerate(weights):
        w["shape"] = tuple(_listed(f"weights[{i}].shape", w["shape"]))
        w["threshold"] = _float(w["threshold"])
    given["weight_decays"] = tuple(map(_float, _listed("weight_decays", given["weight_decays"])))
    given["eps"], given["drop"] = _float(given["eps"]), _float(given["drop"])
    return Setup(**{**given, "weights": tuple(WeightSetup(**w) for w in weights)})


def loaded(text: bytes, *, whole: bool = True) -> Any:
    """What JSON says; with `whole` False a pair, of it and of the place where it ends.

    Raises:
        ValueError: it is none, or would take far more memory than text; json.JSONDecodeError says where it ends.
    """
    outside = _STRINGS.sub(b"", text)
    if outside.count(b"[") + outside.count(b"{") > len(text) // 16 + 64:
        raise ValueError("expected a setup, got lists in lists")
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    try:
        return decoder.decode(text.decode()) if whole else decoder.raw_decode(text.decode("latin-1"))
    except RecursionError:
        raise ValueError("expected a setup, got lists in lists") from None


_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_SMALL: dict[str, Any] = {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Objects of few fields, of which there may be very many, take no memory: they are refused where they stand."""
    if len(pairs) < _LEAST_FIELDS:
        return _SMALL
    known = dict(pairs)
    if len(known) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:40]}: expected each field once, got it twice")
    return known


def _fields(name: str, given: Any, kind: Any) -> dict[str, Any]:
    """The fields of a dataclass, all of them and no others."""
    if not isinstance(given, dict):
        raise TypeError(f"{name}: expected an object, got {type(given).__name__}")
    known = [f.name for f in fields(kind)]
    if missing := [field for field in known if field not in given]:
        raise ValueError(f"{name}: expected the field {missing[0]}, got none")
    if unknown := [field for field in given if field not in known]:
        raise ValueError(f"{name}: expected the fields {', '.join(known)}, got also {unknown[0]}")
    return given


def _listed(name: str, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise TypeError(f"{name}: expected a list, got {type(given).__name__}")
    return given


def _text(name: str, given: Any) -> None:
    if not isinstance(given, str):
        raise TypeError(f"{name}: expected a string, got {type(given).__name__}")
    if len(given) > _MAX_NAME:
        raise ValueError(f"{name}: expected at most {_MAX_NAME} characters, got {len(given)}")


def _float(given: Any) -> Any:
    """A whole number as a float; the rest is for `check`."""
    return float(given) if type(given) is int and abs(given) < 2**1023 else given


def check(setup: Setup) -> None:
    """Each field by itself, and those that must fit together.

    Raises:
        TypeError, ValueError: the message names the field, what was expected and what came.
    """
    _text("method", setup.method)
    _text("noise", setup.noise)
    checks.integer("step", setup.step, 0, MAX_STEP)
    checks.integer("seed", setup.seed, 0, checks.MAX_SEED)
    checks.integer("directions", setup.directions, 1, MAX_DIRECTIONS)
    checks.number("eps", setup.eps, checks.MIN_FLOAT32, checks.MAX_FLOAT32)
    checks.number("drop", setup.drop, 0.0, 1.0, open_high=True)
    checks.integer("blocks", setup.blocks, 0, _MAX_BLOCKS)
    for name in ("continues", "in_place", "stochastic", "svrg", "shared_direction", "anchored"):
        if not isinstance(value := getattr(setup, name), bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        if name in ("shared_direction", "anchored") and value and not setup.svrg:
            raise ValueError(f"{name}: expected False where svrg is, got True")
    _many("weight_decays", setup.weight_decays, 1, _MAX_GROUPS)
    for i, decay in enumerate(setup.weight_decays):
        checks.number(f"weight_decays[{i}]", decay, 0.0)
    _many("weights", setup.weights, 1)
    for i, w in enumerate(setup.weights):
        _check_weight(f"weights[{i}]", w, setup)
    if len({w.name for w in setup.weights}) < len(setup.weights):
        raise ValueError("weights: expected a name for each, got one twice")


def _many(name: str, given: Sequence[Any], least: int, most: int | None = None) -> None:
    if len(given) < least or (most is not None and len(given) > most):
        raise ValueError(f"{name}: expected {least} or more{f', at most {most}' if most else ''}, got {len(given)}")


def _check_weight(at: str, w: WeightSetup, setup: Setup) -> None:
    _text(f"{at}.name", w.name)
    _many(f"{at}.shape", w.shape, 0, _MAX_DIMENSIONS)
    elements = 1
    for n in w.shape:
        checks.integer(f"{at}.shape", n, 0, checks.MAX_INDEX)
        elements *= n
        if elements > checks.MAX_INDEX:
            raise ValueError(f"{at}.shape: expected at most {checks.MAX_INDEX} elements, got {list(w.shape[:8])}")
    if w.dtype not in _DTYPES:
        raise ValueError(f"{at}.dtype: expected one of {', '.join(_DTYPES)}, got {w.dtype!r}")
    checks.integer(f"{at}.param_id", w.param_id, 0, checks.MAX_PARAM_ID)
    checks.integer(f"{at}.row", w.row, 0, 2 * len(setup.weight_decays) - 1)
    if w.block is not None:
        if not setup.blocks:
            raise ValueError(f"{at}.block: expected None where blocks is 0, got {w.block!r}")
        checks.integer(f"{at}.block", w.block, 0, setup.blocks - 1)
    if w.threshold is not None:
        # Those of tensors that hold infinities or nan are so, too.
        wanted = f"{at}.threshold: expected None or a number of at least 0"
        if isinstance(w.threshold, bool) or not isinstance(w.threshold, (int, float)):
            raise TypeError(f"{wanted}, got {type(w.threshold).__name__}")
        if not (math.isnan(w.threshold) or w.threshold >= 0):
            raise ValueError(f"{wanted}, got {w.threshold}")
    _text(f"{at}.fingerprint", w.fingerprint)
    if not _FINGERPRINT.fullmatch(w.fingerprint):
        raise ValueError(f"{at}.fingerprint: expected 16 hex digits, got {w.fingerprint!r}")
