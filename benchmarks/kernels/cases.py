"""`kernels`: one pass over one tensor, against other ways to do it and against its own variants."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from zo_kernels import backends
from zo_kernels.backends.tuning import DEFAULT, Tuning, tuned

from ..bench.compare import Copy, Trial, Versus, compare
from ..bench.registry import Case, Row, Target
from ..bench.timing import Call, Plan
from .baselines import EagerPass, compiled_pass, published_pass
from .kernel_call import EPS, SEED, KernelCall, Kind, weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = tuple(name for name in backends.NAMES if name not in ("reference", "native"))  # native is one of the three
PLAIN = Kind()
VARIANTS = (
    *(replace(PLAIN, mask=mask) for mask in ("threshold", "bool", "bits", "record")),
    *(replace(PLAIN, directions=k) for k in (2, 8)),
    replace(PLAIN, rounding="stochastic"),
    replace(PLAIN, mask="threshold", rounding="stochastic"),
    replace(PLAIN, dropped=0.75),
)
SIGNS = replace(PLAIN, distribution="rademacher")
# The words of a direction are all that it costs, so signs are timed with many, too.
VARIANTS_OF_SIGNS = tuple(replace(k, distribution="rademacher") for k in VARIANTS) + tuple(
    replace(SIGNS, directions=k) for k in (16, 64)
)

# Launches that might be faster on a GPU than the default ones, and the passes they are tried on.
TUNINGS = {
    "warps=2": (("triton",), replace(DEFAULT, warps=2)),
    "warps=8": (("triton",), replace(DEFAULT, warps=8)),
    "warps=16": (("triton",), replace(DEFAULT, warps=16)),
    "prefetch": (("triton",), replace(DEFAULT, prefetch=True)),
    "most_blocks=4": (("triton", "cuda"), replace(DEFAULT, most_blocks=4)),
    "most_blocks=64": (("triton", "cuda"), replace(DEFAULT, most_blocks=64)),
}
TUNED = {"fp32": (PLAIN,), "bf16": (PLAIN, replace(PLAIN, rounding="stochastic"), replace(PLAIN, mask="bits"))}
_FP32_ONLY = "warps=16"  # a thread would have half of an access of 16-bit weights

# Targets, for a tensor that no cache holds.
_STATED_FOR = 64_000_000
_AGAINST_EAGER = {
    "native:avx512": {"fp32": 6.0, "bf16": 7.0},
    "native:avx2": {"fp32": 4.0, "bf16": 5.0},
}
_MASKED_AGAINST_UNMASKED = 1 / 1.06
_TWO_THREADS_AGAINST_ONE = 1.8
# Of signs, one thread with AVX2: against `w.add_(c)`, and against normals in memory and in a cache.
_SIGNS_ON = "native:avx2"
_AGAINST_STREAM = {"fp32": 0.90, "bf16": 0.75}
_AGAINST_NORMALS = {"fp32": 2.0, "bf16": 1.8}
_IN_CACHE, _IN_CACHE_AGAINST_NORMALS = 2**20, 5.0
_MASKED_SIGNS_AGAINST_UNMASKED = 1 / 1.15
_MANY, _MANY_AGAINST_NORMALS = 64, 12.0
_TOO_MANY_FOR_EAGER = 8  # directions, each of which takes it a good part of a second
_OVER_PROPORTION = 1.1  # of a pass that leaves blocks out
_SCALAR_ELEMENTS = 4 * 2**20  # plain C++ is there to be right; more would only take longer

# Tensors in memory: the weights, the copy, the eager buffer, the published pass's temporaries, and a mask.
_TENSORS = 8


@dataclass(frozen=True)
class Timed:
    """A pass to time; `name` says what is changed of the plain one of its dtype and backend."""

    name: str
    dtype: str
    backend: str
    elements: int
    kind: Kind = PLAIN
    threads: int = 1
    tuning: Tuning = DEFAULT

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.backend.startswith("native") else "cuda")


def cases(options: Namespace) -> list[Case]:
    sizes = dict.fromkeys(options.elements)
    return [
        _case(pass_, f"/{elements}" if len(sizes) > 1 else "", options)
        for elements in sizes
        for dtype in DTYPES
        for backend in BACKENDS
        for distribution in options.distribution
        for pass_ in _passes(dtype, backend, elements, distribution)
    ]


def _passes(dtype: str, backend: str, elements: int, distribution: str) -> Iterator[Timed]:
    normal = distribution == "normal"
    kind, variants = (PLAIN, VARIANTS) if normal else (SIGNS, VARIANTS_OF_SIGNS)
    plain = Timed(label(kind), dtype, backend, elements, kind)
    if backend == "native:scalar":
        yield replace(plain, elements=min(elements, _SCALAR_ELEMENTS))
        return
    yield plain
    for kind in variants:
        if kind.rounding == "nearest" or dtype != "fp32":  # fp32 needs no rounding
            yield replace(plain, name=label(kind), kind=kind)
    for kind in TUNED.get(dtype, ()) if normal else ():
        for name, (whose, tuning) in TUNINGS.items():
            if backend in whose and (dtype == "fp32" or name != _FP32_ONLY):
                yield replace(
                    plain, name="/".join(filter(None, (f"tuning:{name}", label(kind)))), kind=kind, tuning=tuning
                )
    if backend.startswith("native"):
        yield replace(plain, name="/".join(filter(None, (plain.name, "threads=2"))), threads=2)


def kinds(only: str = "") -> dict[str, Kind]:
    """The kinds of passes whose label matches a regular expression, by label: "plain", or what differs from that.

    Raises:
        ValueError: no label matches.
    """
    every = {label(kind) or "plain": kind for kind in (PLAIN, *VARIANTS, SIGNS, *VARIANTS_OF_SIGNS)}
    if not (found := {name: kind for name, kind in every.items() if re.search(only, name)}):
        raise ValueError(f"kinds: expected what is found in one of {', '.join(every)}, got {only!r}")
    return found


def label(kind: Kind) -> str:
    changed = {name: value for name, value in asdict(kind).items() if value != getattr(PLAIN, name)}
    return "/".join(f"{name}={value}" for name, value in changed.items())


def _case(timed: Timed, size: str, options: Namespace) -> Case:
    kind, device, dtype = timed.kind, timed.device, DTYPES[timed.dtype]
    # What fits a cache is to be found there, not evicted by the other call of the pair.
    plan = Plan(options.rounds, options.seconds, second=timed.elements <= _IN_CACHE)
    facts = {"backend": timed.backend, "elements": timed.elements, **facts_of(device, dtype, timed.threads)}
    facts |= {"mask": kind.mask, "directions": kind.directions, "rounding": kind.rounding}
    facts |= {
        "distribution": kind.distribution,
        "dropped_share": kind.dropped,
        **({} if timed.tuning == DEFAULT else asdict(timed.tuning)),
    }
    return Case(
        "/".join(filter(None, (timed.dtype, timed.backend, timed.name))) + size,
        facts,
        lambda: compare(_trial(timed, options.compile), plan, device),
        unusable(timed.backend, device, timed.threads),
        str(device),
        lambda: _TENSORS * timed.elements * dtype.itemsize,
    )


def facts_of(device: torch.device, dtype: torch.dtype, threads: int | None = None) -> Row:
    """What every row says of where it ran; the threads are a CPU's."""
    of_cpu = threads if device.type == "cpu" else None
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "threads": of_cpu}


def unusable(backend: str, device: torch.device, threads: int = 1) -> str | None:
    """Why passes of a backend cannot run on a device here, or None."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    try:
        backends.resolve(backend, device)
    except ValueError as error:
        return str(error).rpartition("cannot run here: ")[2]
    if threads > (here := len(os.sched_getaffinity(0))):
        return f"{threads} threads need as many processors, and this process may use {here}"
    return None


def _trial(timed: Timed, compiled: bool) -> Trial:
    w = weights(timed.elements, DTYPES[timed.dtype], timed.device)
    buffer = torch.empty_like(w)
    with tuned(timed.tuning):
        ours = KernelCall(w, timed.kind, timed.backend)
    others, call = list(_others(timed, w, ours, compiled)), Call(ours.run, timed.threads)
    copy = Copy(Call(lambda: buffer.copy_(w), timed.threads), 2 * w.nbytes)
    return Trial(call, ours.check, others, ours.elements, ours.bytes_moved, copy)


def _others(timed: Timed, w: Tensor, ours: KernelCall, compiled: bool) -> Iterator[Versus]:
    """What the pass is compared with."""
    kind, backend = timed.kind, timed.backend
    signs, large = kind.distribution == "rademacher", timed.elements >= _STATED_FOR
    plain = SIGNS if signs else PLAIN

    def against(name: str, run: Callable[[], object], at_least: float | None = None, threads: int = 0) -> Versus:
        targets = [] if at_least is None else [Target("ratio", at_least)]
        return Versus(name, Call(run, threads or timed.threads), targets=targets)

    def usual(kind: Kind) -> Callable[[], object]:
        return KernelCall(w, kind, backend).run

    if timed.tuning != DEFAULT:
        yield against("as it is", usual(kind))
        return
    if timed.threads > 1:
        yield against("one thread", ours.run, _TWO_THREADS_AGAINST_ONE if large and not signs else None, threads=1)
    bound = _bounds_of_signs(timed) if signs else {}
    if (signs and not kind.dropped) or (kind == PLAIN and timed.device.type == "cpu"):
        yield against("in-place stream", lambda: w.add_(0.0), bound.get("in-place stream"))
    if signs:
        yield against("normals", usual(replace(kind, distribution="normal")), bound.get("normals"))
    if kind.mask != "none":
        of_normals = _MASKED_AGAINST_UNMASKED if large and not signs else None
        yield against("unmasked", usual(replace(kind, mask="none")), bound.get("unmasked", of_normals))
        if kind.mask in ("threshold", "bool") and kind.rounding == "nearest":
            mask = ours.mask_of_baseline()
            yield against("eager", _eager(w, kind, mask))
            yield against(_PUBLISHED[kind.distribution], _published(w, kind, mask))
    elif kind.rounding != "nearest":
        yield against("nearest", usual(plain))
    elif kind.dropped:
        share = timed.elements / ours.elements / _OVER_PROPORTION
        yield against("all blocks", usual(plain), share if large else None)
    elif kind.directions <= _TOO_MANY_FOR_EAGER:
        stated = _AGAINST_EAGER.get(backend, {}) if kind == PLAIN and timed.threads == 1 and large else {}
        yield against("eager", _eager(w, kind), stated.get(timed.dtype))
        if kind == plain:
            yield against(_PUBLISHED[kind.distribution], _published(w, kind))
            if not signs and (timed.device.type == "cuda" or compiled):
                noisy = compiled_pass()
                yield against("torch.compile", lambda: noisy(w, EPS))


_PUBLISHED = {"normal": "published MeZO", "rademacher": "published MeZO with randint"}


def _bounds_of_signs(timed: Timed) -> dict[str, float | None]:
    """The least ratio against a baseline of a pass with signs, where one is stated."""
    kind, dtype = timed.kind, timed.dtype
    if timed.backend != _SIGNS_ON or timed.threads > 1:
        return {}
    if timed.elements < _STATED_FOR:
        in_cache = kind == SIGNS and timed.elements == _IN_CACHE and dtype in _AGAINST_NORMALS
        return {"normals": _IN_CACHE_AGAINST_NORMALS} if in_cache else {}
    if kind == SIGNS:
        return {"in-place stream": _AGAINST_STREAM.get(dtype), "normals": _AGAINST_NORMALS.get(dtype)}
    if kind.mask != "none":
        return {"unmasked": _MASKED_SIGNS_AGAINST_UNMASKED}
    return {"normals": _MANY_AGAINST_NORMALS} if kind == replace(SIGNS, directions=_MANY) else {}


def _eager(w: Tensor, kind: Kind, mask: Callable[[], Tensor | None] = lambda: None) -> Callable[[], None]:
    once = EagerPass([w], kind.distribution)

    def run() -> None:
        for k in range(kind.directions):
            once([w], SEED + k, 1.0, EPS, [mask()])

    return run


def _published(w: Tensor, kind: Kind, mask: Callable[[], Tensor | None] = lambda: None) -> Callable[[], None]:
    p = nn.Parameter(w, requires_grad=False)  # the first call gives it other memory; w keeps its own
    return lambda: published_pass([p], SEED, 1.0, EPS, [mask()], kind.distribution)


def cells(row: Row) -> dict[str, str]:
    shown = {
        "ms": f"{row['seconds_median'] * 1e3:,.2f}",
        "Gelem/s": f"{row['gelem_per_s']:.3f}",
        "GB/s": f"{row['gb_per_s']:.2f}",
        "of copy": f"{row['share_of_copy']:.0%}",
    }
    if row["launch_seconds_median"] is None:
        return shown
    dominates = " (dominates)" if row["launch_dominates"] else ""
    return {**shown, "launch ms": f"{row['launch_seconds_median'] * 1e3:,.3f}{dominates}"}
