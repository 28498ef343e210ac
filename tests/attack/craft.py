"""Sound files, with right checksums, that say what no run says."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, replace
from typing import Any

from attack.layout import ANCHOR, BETWEEN, CHECK, ONE_SIDED, REFUSED, SETUP, STEP, Part, sealed
from attack.runs import Recorded

RAW = "@@raw:"  # begins a text that goes into JSON without quotes
NASTY: list[Any] = [
    -1, 0, 1, 2, 5, 1000, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**40, -(2**63), 1.5,
    -1e-3, 1e-300, 1e30, 1e300, f"{RAW}1e400", f"{RAW}NaN", f"{RAW}-Infinity", f"{RAW}{'9' * 5000}", "", "x", "0",
    "v1", "v2", "MeZO", "float64", "normal", "rademacher",
    "µ\u2028\ud83d\ude00", "\x00", "a" * 100000, None, True, False, [], [0], [[]], {},
    {"a": 1}, [None], [1e30], [-1.0], f"{RAW}{'[' * 200}{']' * 200}", f"{RAW}{'[' * 100000}{']' * 100000}",
    [0] * 100000,
]  # fmt: skip
OF_WEIGHT = ("name", "shape", "dtype", "param_id", "row", "block", "threshold", "fingerprint")


@dataclass(frozen=True)
class Crafted:
    """A file.

    Attributes:
        data: of it.
        what: was done.
        fields: that an error may name.
        verdict: "wrong" if it must be refused, "same" if it says what the original does, else "open".
    """

    data: bytes
    what: str
    fields: tuple[str, ...]
    verdict: str = "open"


def acceptable(field: str, value: Any, setup: dict[str, Any]) -> bool:
    """Whether a setup's (or a weight's) field may have this value, written down a second time."""
    if isinstance(value, str) and value.startswith(RAW):
        return False
    whole = isinstance(value, int) and not isinstance(value, bool)
    real = (whole or isinstance(value, float)) and abs(value) < 1e308
    match field:
        case "method":
            return isinstance(value, str)  # another one is refused by whoever needs it
        case "noise":
            return value == "v1"
        case "distribution":
            return value in ("normal", "rademacher")
        case "seed":
            return whole and 0 <= value < 2**64
        case "step":
            return whole and 0 <= value < 2**63
        case "directions":
            return whole and 1 <= value <= 2**16
        case "eps":
            return real and value > 0
        case "drop":
            return real and 0 <= value < 1
        case "blocks":
            return whole and value >= 0
        case "continues" | "in_place" | "stochastic" | "svrg" | "shared_direction" | "anchored":
            return isinstance(value, bool)
        case "weight_decays":
            return (
                isinstance(value, list) and len(value) > 0 and all(acceptable("eps", v, setup) or v == 0 for v in value)
            )
        case "weights":
            return False  # the pool has no list of weights
        case "name":
            return isinstance(value, str)
        case "shape":
            return isinstance(value, list) and all(isinstance(v, int) and 0 <= v < 2**63 for v in value)
        case "dtype":
            return value in ("float32", "bfloat16", "float16")
        case "param_id":
            return whole and 0 <= value < 2**32
        case "row":
            return whole and 0 <= value < 2 * len(setup["weight_decays"])
        case "block":
            return value is None or (whole and 0 <= value < setup["blocks"])
        case "threshold":
            return value is None or (real and value >= 0)
        case "fingerprint":
            return False  # of the pool none has 16 hex digits
    return False


def text_of(value: Any, draw: random.Random | None = None) -> bytes:
    """JSON, with what is raw; in another order and with spaces if drawn."""
    if draw is not None:
        items = list(value.items())
        draw.shuffle(items)
        value = dict(items)
    text = json.dumps(value, separators=(" ,\n", " : ") if draw else (",", ":"))
    while (at := text.find(f'"{RAW}')) >= 0:
        end = text.index('"', at + 1)
        text = text[:at] + text[at + 1 + len(RAW) : end] + text[end + 1 :]
    return text.encode()


def craft(draw: random.Random, known: Recorded) -> Crafted:
    """One."""
    parts = list(known.parts)
    setups = [i for i, p in enumerate(parts) if p.kind == SETUP]
    steps = [i for i, p in enumerate(parts) if p.kind not in (SETUP, CHECK)]
    how = draw.choice(("field", "field", "field", "weight", "weight", "weight", "text", "record", "record", "order"))
    if how in ("field", "weight"):
        return _field(draw, parts, draw.choice(setups), of_weight=how == "weight")
    if how == "text":
        return _text(draw, parts, draw.choice(setups))
    if how == "record":
        return _record(draw, parts, draw.choice(steps))
    return _order(draw, parts)


def _field(draw: random.Random, parts: list[Part], at: int, *, of_weight: bool) -> Crafted:
    setup = json.loads(parts[at].text)
    original = json.loads(parts[at].text)
    entry: dict[str, Any] = draw.choice(setup["weights"]) if of_weight else setup
    field = draw.choice(list(entry))
    how, verdict = draw.choice(("change",) * 6 + ("delete", "add", "type")), "wrong"
    value: Any = None
    if how == "delete":
        del entry[field]
        verdict = "open" if field == "distribution" else "wrong"  # then it is a run of normals
    elif how == "add":
        field, value = draw.choice(("extra", "", "Seed", "__class__", "distribution")), draw.choice(NASTY)
        entry[field] = value
        if field == "distribution" and not of_weight and acceptable(field, value, original):
            verdict = "open"
    elif how == "type":
        old = entry[field]
        value = draw.choice(([old], {"v": old}, str(old), f"{RAW}[[{json.dumps(old)}]]"))
        fits = isinstance(old, str) and value == old
        entry[field], verdict = value, "open" if fits or field in ("name", "method") else "wrong"
    else:
        value = draw.choice(NASTY)
        if of_weight and draw.random() < 0.5:
            for w in setup["weights"]:
                w[field] = value
        else:
            entry[field] = value
        infinite = field == "threshold" and value == f"{RAW}1e400"  # as of a tensor that holds infinities
        if infinite or acceptable(field, value, original):
            verdict = "open"
        if of_weight and field in ("name", "shape", "dtype", "param_id") and entry[field] != original:
            verdict = "open" if verdict == "open" else "wrong"
    shown = repr(value)[:40]
    parts[at] = parts[at].with_text(text_of(setup))
    names = (field, "weights") if of_weight else (field,)
    if str(value).startswith(RAW) or how == "delete":  # no JSON; or a field that is not there
        names = (*names, "setup", "record")
    return Crafted(sealed(parts), f"setup {at}: {how} {'weight ' * of_weight}{field} {shown}", names, verdict)


def _text(draw: random.Random, parts: list[Part], at: int) -> Crafted:
    text, setup = parts[at].text, json.loads(parts[at].text)
    how = draw.choice(("same", "same", "utf", "cut", "list", "null", "twice", "nothing", "bytes"))
    made = {
        "same": lambda: text_of(setup, draw),
        "utf": lambda: text.replace(b"e", "é".encode("latin1"), 3),
        "cut": lambda: text[: draw.randrange(len(text))],
        "list": lambda: b"[" + text + b"]",
        "null": lambda: b"null",
        "twice": lambda: text[:-1] + b',"' + draw.choice((b"seed", b"weights", b"eps")) + b'":3}',
        "nothing": lambda: b"",
        "bytes": lambda: draw.randbytes(50),
    }[how]()
    parts[at] = parts[at].with_text(made)
    verdict = {"same": "same", "twice": "open"}.get(how, "wrong")
    return Crafted(sealed(parts), f"setup {at}: text {how}", ("setup", "record", "seed", "weights", "eps"), verdict)


def _record(draw: random.Random, parts: list[Part], at: int) -> Crafted:
    part = parts[at]
    how = draw.choice(("kind", "flags", "count", "numbers", "numbers", "probes", "length", "fingerprint"))
    verdict = "open"
    if how == "kind":
        part = replace(part, kind=draw.choice([k for k in (*range(8), 8, 100, 255) if k != part.kind]))
        verdict = "wrong" if part.kind > ONE_SIDED else "open"
    elif how == "flags":
        part = replace(part, flags=part.flags ^ draw.choice((1, 2, 3, 4, 128, 255)))
    elif how == "count":
        part = replace(part, count=draw.choice((0, 1, 2, 7, 65535)))
    elif how == "numbers" and part.kind in (STEP, ANCHOR, BETWEEN, ONE_SIDED):
        body = bytearray(part.body)
        value = draw.choice((float("nan"), float("inf"), -1.0, 1e308, -1e308, 0.0, 1e-320))
        struct.pack_into("<d", body, draw.randrange(0, len(body) - 7, 4), value)
        part = replace(part, body=bytes(body))
    elif how == "probes":
        probes = draw.choice((0, 1, 2, 7, 10**6, 2**31, 2**32 - 1))
        part = Part(draw.choice((REFUSED, 5)), 0, 0, struct.pack("<I", probes))
        verdict = "wrong" if probes > 100 else "open"
    elif how == "fingerprint":
        parts.insert(at, Part(CHECK, 0, 0, draw.randbytes(8)))
        return Crafted(sealed(parts), f"record {at}: a fingerprint", ("record", "weights"), "open")
    else:
        part = replace(part, body=part.body[: draw.randrange(len(part.body))])
    parts[at] = part
    return Crafted(sealed(parts), f"record {at}: {how}", ("record", "step"), verdict)


def _order(draw: random.Random, parts: list[Part]) -> Crafted:
    how = draw.choice(("swap", "repeat", "drop", "setup twice", "no setup"))
    i, j = draw.randrange(len(parts)), draw.randrange(len(parts))
    if how == "swap":
        parts[i], parts[j] = parts[j], parts[i]
    elif how == "repeat":
        parts.insert(j, parts[i])
    elif how == "drop":
        del parts[i]
    elif how == "setup twice":
        parts.insert(i, next(p for p in parts if p.kind == SETUP))
    else:
        parts = [p for p in parts if p.kind != SETUP]
    verdict = "wrong" if not parts or (parts[0].kind != SETUP and parts) else "open"
    return Crafted(sealed(parts), f"order: {how}", ("record", "setup", "weights"), verdict)
