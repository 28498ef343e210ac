"""`kernels`: one pass over one tensor, against other ways to do it and against its own variants."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

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

# What might make a GPU's kernels faster, against what they are; other kinds of passes have other needs.
TUNINGS = {
    "warps=2": (("triton",), replace(DEFAULT, warps=2)),
    "warps=8": (("triton",), replace(DEFAULT, warps=8)),
    "warps=16": (("triton",), replace(DEFAULT, warps=16)),
    "prefetch": (("triton",), replace(DEFAULT, prefetch=True)),
    "most_blocks=4": (("triton", "cuda"), replace(DEFAULT, most_blocks=4)),
    "most_blocks=64": (("triton", "cuda"), replace(DEFAULT, most_blocks=64)),
}
TUNED = {
    "fp32": (PLAIN,),
    "bf16": (PLAIN, replace(PLAIN, rounding="stochastic"), replace(PLAIN, mask="bits")),
}
_FP32_ONLY = "warps=16"  # a thread would have half of an access of 16-bit weights

# What is to be reached, on a tensor too large for any cache.
_STATED_FOR = 64_000_000
_AGAINST_EAGER = {
    ("native:avx512", "fp32"): 6.0,
    ("native:avx512", "bf16"): 7.0,
    ("native:avx2", "fp32"): 4.0,
    ("native:avx2", "bf16"): 5.0,
}
_MASKED_AGAINST_UNMASKED = 1 / 1.06
_TWO_THREADS_AGAINST_ONE = 1.8
_OVER_PROPORTION = 1.1  # of a pass that leaves blocks out
_SCALAR_ELEMENTS = 4 * 2**20  # plain C++ is there to be right; more would only take longer

# The weights, the copy, the eager buffer, and what the published pass has at one time; masks are smaller than a tensor.
_TENSORS = 8


def cases(options: Namespace) -> list[Case]:
    return list(_cases(options))


def _cases(options: Namespace) -> Iterator[Case]:
    for elements in dict.fromkeys(options.elements):
        size = f"/{elements}" if len(options.elements) > 1 else ""
        for dtype in DTYPES:
            for backend in BACKENDS:
                stem = f"{dtype}/{backend}"
                few = min(elements, _SCALAR_ELEMENTS) if backend == "native:scalar" else elements
                yield _case(stem + size, options, dtype, backend, few, PLAIN)
                if backend == "native:scalar":
                    continue
                for kind in VARIANTS:
                    if kind.rounding == "stochastic" and dtype == "fp32":
                        continue  # fp32 needs no rounding
                    yield _case(f"{stem}/{label(kind)}{size}", options, dtype, backend, elements, kind)
                for kind in TUNED.get(dtype, ()):
                    for name, (whose, tuning) in TUNINGS.items():
                        if backend in whose and (dtype == "fp32" or name != _FP32_ONLY):
                            case = "/".join(filter(None, (stem, f"tuning:{name}", label(kind))))
                            yield _case(case + size, options, dtype, backend, elements, kind, tuning=tuning)
                if backend.startswith("native"):
                    yield _case(f"{stem}/threads=2{size}", options, dtype, backend, elements, PLAIN, threads=2)


def kinds(only: str = "") -> dict[str, Kind]:
    """Each kind of pass by its label, "plain" or what is changed of it, if the regular expression is found in that.

    Raises:
        ValueError: it is found in none.
    """
    every = {label(kind) or "plain": kind for kind in (PLAIN, *VARIANTS)}
    if not (found := {name: kind for name, kind in every.items() if re.search(only, name)}):
        raise ValueError(f"kinds: expected what is found in one of {', '.join(every)}, got {only!r}")
    return found


def label(kind: Kind) -> str:
    changed = {name: getattr(kind, name) for name in ("mask", "directions", "rounding", "dropped")}
    return "/".join(f"{name}={value}" for name, value in changed.items() if value != getattr(PLAIN, name))


def _case(
    name: str,
    options: Namespace,
    dtype: str,
    backend: str,
    elements: int,
    kind: Kind,
    threads: int = 1,
    tuning: Tuning = DEFAULT,
) -> Case:
    device = torch.device("cpu" if backend.startswith("native") else "cuda")
    facts = {
        "backend": backend,
        "device": str(device),
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "elements": elements,
        "threads": threads if device.type == "cpu" else None,
        "mask": kind.mask,
        "directions": kind.directions,
        "rounding": kind.rounding,
        "dropped_share": kind.dropped,
        **({} if tuning == DEFAULT else asdict(tuning)),
    }

    def measure() -> list[Row]:
        if tuning != DEFAULT:
            trial = _of_tuning(dtype, backend, elements, kind, tuning, device)
        else:
            trial = _trial(options, dtype, backend, elements, kind, threads, device)
        return compare(trial, Plan(options.rounds, options.seconds), device)

    return Case(
        name,
        facts,
        measure,
        unusable(backend, device, threads),
        str(device),
        lambda: _TENSORS * elements * DTYPES[dtype].itemsize,
    )


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


def _trial(
    options: Namespace, dtype: str, backend: str, elements: int, kind: Kind, threads: int, device: torch.device
) -> Trial:
    w = weights(elements, DTYPES[dtype], device)
    ours = KernelCall(w, kind, backend)
    buffer = torch.empty_like(w)

    def targets(at_least: float | None) -> list[Target]:
        return [Target("ratio", at_least)] if at_least is not None and elements >= _STATED_FOR else []

    def against(name: str, run: Callable[[], object], at_least: float | None = None, threads: int = threads) -> Versus:
        return Versus(name, Call(run, threads), targets=targets(at_least))

    versus = []
    if threads > 1:
        versus.append(against("one thread", ours.run, _TWO_THREADS_AGAINST_ONE, threads=1))
    if kind.mask != "none":
        unmasked = KernelCall(w, replace(kind, mask="none"), backend)
        versus.append(against("unmasked", unmasked.run, _MASKED_AGAINST_UNMASKED))
        if kind.mask in ("threshold", "bool") and kind.rounding == "nearest":
            mask = ours.mask_of_baseline()
            versus.append(against("eager", _eager(w, 1, mask)))
            versus.append(against("published MeZO", _published(w, mask)))
    elif kind.rounding != "nearest":
        versus.append(against("nearest", KernelCall(w, PLAIN, backend).run))
    elif kind.dropped:
        bound = elements / ours.elements / _OVER_PROPORTION
        versus.append(against("all blocks", KernelCall(w, PLAIN, backend).run, bound))
    else:
        stated = _AGAINST_EAGER.get((backend, dtype)) if kind == PLAIN and threads == 1 else None
        versus.append(against("eager", _eager(w, kind.directions), stated))
        if kind == PLAIN:
            versus.append(against("published MeZO", _published(w)))
            if device.type == "cuda" or options.compile:
                noisy = compiled_pass()
                versus.append(against("torch.compile", lambda: noisy(w, EPS)))
    return Trial(
        Call(ours.run, threads),
        ours.check,
        versus,
        ours.elements,
        ours.bytes_moved,
        Copy(Call(lambda: buffer.copy_(w), threads), 2 * w.nbytes),
    )


def _of_tuning(dtype: str, backend: str, elements: int, kind: Kind, tuning: Tuning, device: torch.device) -> Trial:
    """The same pass, divided otherwise."""
    w = weights(elements, DTYPES[dtype], device)
    usual, buffer = KernelCall(w, kind, backend), torch.empty_like(w)
    with tuned(tuning):
        other = KernelCall(w, kind, backend)
    copy = Copy(Call(lambda: buffer.copy_(w)), 2 * w.nbytes)
    versus = [Versus("as it is", Call(usual.run))]
    return Trial(Call(other.run), other.check, versus, other.elements, other.bytes_moved, copy)


def _unmasked() -> None:
    return None


def _eager(w: Tensor, directions: int, mask: Callable[[], Tensor | None] = _unmasked) -> Callable[[], None]:
    once = EagerPass([w])

    def run() -> None:
        for k in range(directions):
            once([w], SEED + k, 1.0, EPS, [mask()])

    return run


def _published(w: Tensor, mask: Callable[[], Tensor | None] = _unmasked) -> Callable[[], None]:
    p = nn.Parameter(w, requires_grad=False)  # its memory is replaced at the first call, that of w stays
    return lambda: published_pass([p], SEED, 1.0, EPS, [mask()])


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
