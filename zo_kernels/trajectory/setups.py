"""The setup records of a trajectory: the options of a run, their JSON, and the checks of each field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from .. import checks, spec
from .difference import DIFFERENCES

MAX_TEXT = 2**25  # bytes of a setup: about 150,000 weights
MAX_DIRECTIONS = 2**16
MAX_STEP = 2**44 - 1  # more does not fit the counters that seeds are drawn from
MASKS = ("redrawn", "kept")
_MAX_BLOCKS = 2**16
_MAX_DIMENSIONS = 1000
_MAX_GROUPS = 2**20
_MAX_NAME = 2**12
ESTIMATORS = tuple(DIFFERENCES)
NORMALIZE = ("none", "std", "rms")
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES)
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class WeightSetup:
    """A trained parameter; see `weights.tables.Weight`. `fingerprint` is that of its value when the setup was made."""

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
    """What a replay needs to know beside the records of the steps; it holds until the next setup.

    Args:
        method: class name of the optimizer.
        noise: version of the noise.
        distribution: of the noise.
        mask: one of MASKS: whether each step takes the magnitude masks from its weights, or the run keeps those of the
            moment when a weight's first setup was made.
        estimator: the name of the `difference.Difference` that gives g; MeZO-SVRG's is "two_sided".
        normalize: what the learning rates are divided by: "none", "std" or "rms" (`estimators.normalize`).
        rms: of "rms" its beta and delta, and its two sums when the setup was made; else empty.
        anneal: MeZO-SVRG: what the rates are divided by and κ, how often they were divided when the setup was made, and
            the loss at the anchor before, if there was one; empty if they never are.
        step: steps taken before.
        continues: whether the weights are those that the earlier records lead to; True for the first setup.
        seed, directions, eps, drop: options of the optimizer.
        blocks: number of transformer blocks.
        in_place: whether weights are perturbed in place, which rounds them.
        stochastic: whether 16-bit weights are rounded stochastically.
        weight_decays: one for each parameter group.
        svrg: whether the steps are MeZO-SVRG's.
        shared_direction: MeZO-SVRG's option of that name.
        anchored: MeZO-SVRG: whether an anchor from an earlier record is in use.
        weights: the trained parameters, in the order of the passes.
    """

    method: str
    noise: str
    distribution: str = field(default="normal", kw_only=True)
    mask: str = field(default="redrawn", kw_only=True)
    estimator: str = field(default="two_sided", kw_only=True)
    normalize: str = field(default="none", kw_only=True)
    rms: tuple[float, ...] = field(default=(), kw_only=True)
    anneal: tuple[float, ...] = field(default=(), kw_only=True)
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

    @property
    def most_probes(self) -> int:
        """How many times the probes of an estimate perturb the weights."""
        return DIFFERENCES[self.estimator].probes(self.directions)


_LEAST_FIELDS = len(fields(WeightSetup))


def as_text(setup: Setup) -> bytes:
    """Encode a setup as JSON, after checking that it can be read again.

    Raises:
        TypeError, ValueError: it could not; the message names the field.
    """
    check(setup)
    given = asdict(setup)
    for f in fields(setup):  # earlier versions read a setup without such a field, and refuse one with a field more
        if f.default is not MISSING and given[f.name] == f.default:
            del given[f.name]
    text = json.dumps(given, separators=(",", ":")).encode()
    if len(text) > MAX_TEXT:
        raise ValueError(f"trajectory: expected at most {MAX_TEXT} bytes of names and options, got {len(text)}")
    return text


def from_text(text: bytes) -> Setup:
    """Decode a setup from JSON. Its fields are present and of the right structure; their values are not checked yet.

    Raises:
        TypeError, ValueError: the text is no setup.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"expected at most {MAX_TEXT} bytes, got {len(text)}")
    given = _fields("setup", loaded(text), Setup)
    weights = [_fields(f"weights[{i}]", w, WeightSetup) for i, w in enumerate(_listed("weights", given["weights"]))]
    for i, w in enumerate(weights):
        w["shape"] = tuple(_listed(f"weights[{i}].shape", w["shape"]))
        w["threshold"] = _float(w["threshold"])
    given["weight_decays"] = tuple(map(_float, _listed("weight_decays", given["weight_decays"])))
    for name in ("rms", "anneal"):
        given[name] = tuple(map(_float, _listed(name, given.get(name, []))))
    given["eps"], given["drop"] = _float(given["eps"]), _float(given["drop"])
    return Setup(**{**given, "weights": tuple(WeightSetup(**w) for w in weights)})


def loaded(text: bytes, *, whole: bool = True) -> Any:
    """Parse JSON; with `whole` False the text may go on after it, and a pair (value, where it ends) is returned.

    Raises:
        json.JSONDecodeError: the text is no JSON.
        ValueError: it has so many nested lists that parsing would take far more memory than the text.
    """
    outside = _STRINGS.sub(b"", text)
    if outside.count(b"[") + outside.count(b"{") > len(text) // 16 + 64:
        raise ValueError("expected a setup, got deeply nested lists")
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    try:
        return decoder.decode(text.decode()) if whole else decoder.raw_decode(text.decode("latin-1"))
    except RecursionError:
        raise ValueError("expected a setup, got deeply nested lists") from None


_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_SMALL: dict[str, Any] = {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Small ones become one shared empty dict, which is refused later: a file may have millions."""
    if len(pairs) < _LEAST_FIELDS:
        return _SMALL
    known = dict(pairs)
    if len(known) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:40]}: expected this field once, got it twice")
    return known


def _fields(name: str, given: Any, kind: Any) -> dict[str, Any]:
    """Return `given` if it has exactly the fields of the dataclass `kind`."""
    if not isinstance(given, dict):
        raise TypeError(f"{name}: expected an object, got {type(given).__name__}")
    known = [f.name for f in fields(kind)]
    if missing := [f.name for f in fields(kind) if f.name not in given and f.default is MISSING]:
        raise ValueError(f"{name}: expected the field {missing[0]}, got none")
    if unknown := [key for key in given if key not in known]:
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
    """Convert an int to a float; leave anything else to `check`."""
    return float(given) if type(given) is int and abs(given) < 2**1023 else given


def check(setup: Setup) -> None:
    """Check each field of a setup, and fields that depend on each other.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it.
    """
    _text("method", setup.method)
    _text("noise", setup.noise)
    checks.choice("distribution", setup.distribution, spec.DISTRIBUTIONS)
    checks.choice("mask", setup.mask, MASKS)
    _check_estimator(setup)
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
        raise ValueError("weights: expected different names, got one twice")


def _check_estimator(setup: Setup) -> None:
    own = not setup.svrg
    checks.choice("estimator", setup.estimator, ESTIMATORS if own else ESTIMATORS[:1])
    checks.choice("normalize", setup.normalize, NORMALIZE if own else NORMALIZE[:1])
    wanted = 4 if setup.normalize == "rms" else 0
    if len(setup.rms) != wanted:
        raise ValueError(f"rms: expected {wanted} numbers where normalize is {setup.normalize}, got {len(setup.rms)}")
    for name, value, high in zip(("beta", "delta", "sum", "weight"), setup.rms, (1.0, 1e30, 1e60, 1.0), strict=False):
        checks.number(f"rms: {name}", value, 0.0, high)
    lengths = (0, 3, 4) if setup.svrg else (0,)
    if len(setup.anneal) not in lengths:
        raise ValueError(f"anneal: expected {' or '.join(map(str, lengths))} numbers, got {len(setup.anneal)}")
    for name, value, low in zip(
        ("factor", "above", "annealed", "loss"), setup.anneal, (1, 1, 0, -math.inf), strict=False
    ):
        checks.number(f"anneal: {name}", value, low)
    if setup.normalize == "std" and setup.directions < 2:
        raise ValueError(f"directions: expected at least 2 where normalize is std, got {setup.directions}")


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
        # The threshold of a tensor with infinities or NaN may be infinite or NaN.
        wanted = f"{at}.threshold: expected None or a number of at least 0"
        if isinstance(w.threshold, bool) or not isinstance(w.threshold, (int, float)):
            raise TypeError(f"{wanted}, got {type(w.threshold).__name__}")
        if not (math.isnan(w.threshold) or w.threshold >= 0):
            raise ValueError(f"{wanted}, got {w.threshold}")
    _text(f"{at}.fingerprint", w.fingerprint)
    if not _FINGERPRINT.fullmatch(w.fingerprint):
        raise ValueError(f"{at}.fingerprint: expected 16 hex digits, got {w.fingerprint!r}")
