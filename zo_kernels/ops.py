"""The primitive: `add_noise_` once, `Table` for many passes over the same tensors, `noise` for the noise alone.

    w <- round( decay * w + m . sum_k scale_k * z(seed_k) )        (docs/noise.md)

Everything is checked here, before any weight changes, and then handed to a backend (`backends`). There are four levels:
the function (`add_noise_`), the table (`Table`, and what a backend prepares from it), the launch, the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from . import backends, checks
from .backends import staged
from .backends.fits import MASKED, Checked, Fits
from .backends.staged import Staging
from .backends.types import Entry, InC, MaskKind, Pass
from .interrupts import Call, at_once, signals_held
from .layouts import layouts
from .spec import DISTRIBUTIONS

ROUNDINGS = ("nearest", "stochastic")


class Table:
    """Tensors that are checked once and then changed by any number of passes, each with other seeds and scales.

    If a tensor's memory is replaced (`p.data = ...`), build the table again; until then `apply` raises.

    Args:
        entries: the tensors; see `backends.types.Entry`. A `dst` may not overlap memory of another entry. Its own `src`
            is the same tensor or does not overlap it.
        names: the name of each tensor in errors.
        backend: see `add_noise_`.
        runs: for shards that are several stretches of a parameter, such as columns: for each entry, the indices of its
            stretches' first elements in the whole parameter. The stretches of an entry are equally long, and each has
            whole bytes of mask bits. None: each entry is one stretch, from its `offset` on.
        private: whether nobody else can reach dst and the masks: then `apply` neither checks that they are where they
            were nor bumps dst's autograd version. src is checked in any case.
        own_masks: whether nobody else can replace the masks, so that `apply` does not check them.
        staging: memory for passes over tensors that are not contiguous, to share with other tables.

    Raises:
        TypeError, ValueError: as `add_noise_`.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        names: Sequence[str],
        backend: str | None = None,
        runs: Sequence[Sequence[int]] | None = None,
        *,
        private: bool = False,
        own_masks: bool = False,
        staging: Staging | None = None,
    ):
        self.entries, self.names = tuple(entries), tuple(names)
        self._run: Callable[[Pass], None] | None = None
        self._fits = Fits(self.entries, self.names, runs, any_layout=True)
        if self.entries:
            where = entries[0].dst.device
            where_of = [[e.offset] for e in entries] if runs is None else runs
            pieces = [_cut(e, offsets) for e, offsets in zip(entries, where_of, strict=True)]
            ends = [0, *accumulate(len(p) for p in pieces)]
            self._pieces = [range(a, b) for a, b in pairwise(ends)]
            self._has_cuts = len(pieces) < ends[-1]
            every = Checked(piece for each in pieces for piece in each)
            self._run = staged.prepare(backends.resolve(backend, where), every, staging)
        elif backend is not None:
            backends.resolve(backend, torch.device("cpu"))
        self._private = private
        looked_at = [] if private or own_masks else [e.mask_tensor for e in self.entries if e.mask in MASKED]
        self._masks = [m for m in looked_at if m is not None]
        tensors = [e.src for e in self.entries] + ([] if private else [e.dst for e in self.entries])
        self._tensors = list(dict.fromkeys(tensors))
        self._known = self._memory()
        self._counted = [e.dst for e in self.entries if not e.dst.is_inference()]

    def _memory(self) -> tuple[Sequence[object], ...]:
        """Addresses, sizes and layouts of the tensors, often hundreds. This runs in every pass, so it must be fast."""
        tensors = self._tensors
        where = [*map(Tensor.data_ptr, tensors)], [*map(Tensor.numel, tensors)], layouts(tensors)
        return (*where, [*map(Tensor.data_ptr, self._masks)]) if self._masks else where

    def apply(self, do: Pass, then: Sequence[Call] = (), first: Sequence[Call] = ()) -> None:
        """Apply a pass to the active entries.

        The caller has checked that seeds have 64 bits and that scales and decays are finite.

        Args:
            do: the pass.
            then: C functions to call after the pass, which note that it happened. If the table is `in_c`, an exception
                from outside comes before the pass or after them, never between; if it is not, signals wait until they
                are done.
            first: C functions to call before a pass of a table that is not `in_c`, which note that it begins.

        Raises:
            ValueError: there are fewer scales or decays than the entries' groups need, or `active` has an index of no
                entry, or one twice. Nothing was changed.
            RuntimeError: a tensor's memory was replaced since the table was built, or (native backend) a pass in
                another thread works on the same memory at this moment. Nothing was changed. Other changes by other
                threads, by PyTorch or between the passes of a step, are not noticed.
        """
        if self._run is None:
            at_once(then)
            return
        if self._memory() != self._known:
            raise RuntimeError("a tensor's memory was replaced since its table was built; nothing was changed")
        if do.active is not None:
            self._fits.check(do)
        if not self._private:
            changed = self._counted
            if do.active is not None:
                changed = [e.dst for i in do.active if not (e := self.entries[i]).dst.is_inference()]
            torch.autograd.graph.increment_version(changed)
        if do.active is not None and self._has_cuts:
            do = replace(do, active=[at for i in do.active for at in self._pieces[i]])
        if not then:
            self._run(do)
        elif isinstance(self._run, InC):
            at_once([self._run.bound(do), *then])
        else:
            self._fits.check(do)
            with signals_held():
                at_once([*first, partial(self._run, do), *then])

    @property
    def in_c(self) -> bool:
        """Whether a pass is one call in C, so that no exception from outside can come in the middle of it."""
        return self._run is None or isinstance(self._run, InC)


def _cut(entry: Entry, offsets: Sequence[int]) -> list[Entry]:
    """Cut an entry into one for each of its stretches."""
    if len(offsets) == 1:
        return [replace(entry, offset=offsets[0])]

    def parts(t: Tensor) -> Sequence[Tensor]:
        return t.detach().view(len(offsets), t.numel() // len(offsets)).unbind()

    dsts, srcs = parts(entry.dst), parts(entry.src)
    masks: Sequence[Tensor | None] = [None] * len(offsets)
    if entry.mask in MASKED and entry.mask_tensor is not None:
        masks = parts(entry.mask_tensor)
    return [
        replace(entry, dst=dst, src=src, offset=offset, mask_tensor=mask)
        for dst, src, offset, mask in zip(dsts, srcs, offsets, masks, strict=True)
    ]


def _directions(seeds: object, scales: object) -> tuple[list[int], list[float]]:
    one = not isinstance(seeds, Sequence) and not isinstance(scales, Sequence)
    seeds = [seeds] if one else checks.sequence("seeds", seeds)
    scales = [scales] if one else checks.sequence("scales", scales, len(seeds))
    if not seeds:
        raise ValueError("seeds: expected at least one direction, got none")
    return (
        [checks.integer(f"seeds[{k}]", s, 0, checks.MAX_SEED) for k, s in enumerate(seeds)],
        [checks.number(f"scales[{k}]", s, -checks.MAX_FLOAT32, checks.MAX_FLOAT32) for k, s in enumerate(scales)],
    )


def add_noise_(
    tensors: Sequence[Tensor],
    seeds: int | Sequence[int],
    scales: float | Sequence[float],
    *,
    param_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    decay: float = 1.0,
    masks: Sequence[float | Tensor | None] | None = None,
    rounding: str = "nearest",
    distribution: str = "normal",
    backend: str | None = None,
) -> None:
    """Add seeded random noise to tensors in one pass: w <- round(decay * w + m . sum_k scale_k * z(seed_k)).

    z is standard normal, or -1 or +1 with equal probability (Rademacher). It is a pure function of (seed, param id,
    element index); its bits do not depend on dtype, device, backend or threads (docs/noise.md). Arithmetic is float32:
    t = decay * w, then t = fma(scale_k, z_k, t) for each direction in order, then one rounding to the tensor's dtype.
    Temporary memory does not grow with the tensors, except for a copy of each mask that is not contiguous.

    Args:
        tensors: float32, bfloat16 or float16 tensors of any shapes, all on one device, none overlapping. Changed in
            place. Leaves that require grad are accepted and stay leaves. Any memory order without gaps is accepted,
            such as channels_last or transposed. An element's noise depends on its logical index in the tensor, so the
            layout changes no value.
        seeds: a seed in [0, 2**64) for each direction, or a single one.
        scales: a finite number for each direction, or a single one.
        param_ids: the id of each tensor, in [0, 2**32): tensors with different ids get different noise. None for
            0, 1, 2, ....
        offsets: the index of each tensor's first element in the whole parameter, for shards; None for 0.
        decay: finite factor of the old weights.
        masks: for each tensor None (all elements change), a threshold h (elements with |w| <= h change) or a bool
            tensor of its shape and device (elements where it is true change). All other elements keep their bits.
        rounding: how results are rounded to 16 bits: "nearest" (ties to even) or "stochastic". No effect on float32.
        distribution: of z: "normal", or "rademacher" for random signs, which are cheaper to make.
        backend: None to choose by device ("native" on a CPU, "triton" on a GPU), or "reference", "native",
            "native:avx512", "native:avx2", "native:scalar", "triton", "cuda".

    Raises:
        TypeError, ValueError: bad input; the message names it, and no tensor has been changed.
    """
    tensors = checks.sequence("tensors", tensors)
    names = [f"tensors[{i}]" for i in range(len(tensors))]
    for name, t in zip(names, tensors, strict=True):
        checks.weight(name, t)
    n = len(tensors)
    ids = list(range(n)) if param_ids is None else checks.sequence("param_ids", param_ids, n)
    starts = [0] * n if offsets is None else checks.sequence("offsets", offsets, n)
    given = [None] * n if masks is None else checks.sequence("masks", masks, n)
    seeds, scales = _directions(seeds, scales)
    decay = checks.number("decay", decay, -checks.MAX_FLOAT32, checks.MAX_FLOAT32)
    checks.choice("rounding", rounding, ROUNDINGS)
    checks.choice("distribution", distribution, DISTRIBUTIONS)
    entries = []
    for i, t in enumerate(tensors):
        mask = checks.mask(f"masks[{i}]", given[i], t)
        kind, threshold, mask_tensor = MaskKind.NONE, 0.0, None
        if isinstance(mask, Tensor):
            kind, mask_tensor = MaskKind.BOOL, mask
        elif mask is not None:
            kind, threshold = MaskKind.THRESHOLD, mask
        entries.append(Entry(t, t, ids[i], starts[i], mask=kind, threshold=threshold, mask_tensor=mask_tensor))
    table = Table(entries, names, backend)
    table.apply(Pass(seeds, [scales], [decay], rounding == "stochastic", distribution=distribution))


def noise(
    shape: int | Sequence[int],
    *,
    seed: int,
    param_id: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    distribution: str = "normal",
    backend: str | None = None,
) -> Tensor:
    """The noise itself, standard normal or random signs: zeros to which `add_noise_` has added noise of scale 1.

    Args:
        shape: shape of the result.
        seed: seed of the direction, in [0, 2**64).
        param_id: id of the parameter, in [0, 2**32).
        offset: index of the first element in the whole parameter.
        dtype: float32, bfloat16 or float16. Computed in float32, then rounded to nearest.
        device, distribution, backend: see `add_noise_`.

    Returns:
        A new contiguous tensor of this shape, dtype and device.

    Raises:
        TypeError, ValueError: bad input; the message names it.
    """
    if dtype not in checks.DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    seed = checks.integer("seed", seed, 0, checks.MAX_SEED)
    sizes = checks.sequence("shape", shape) if isinstance(shape, Sequence) else [shape]
    sizes = [checks.integer(f"shape[{i}]", n, 0) for i, n in enumerate(sizes)]
    checks.choice("distribution", distribution, DISTRIBUTIONS)
    z = torch.zeros(sizes, dtype=dtype, device=checks.usable_device("device", device))
    do = Pass([seed], [[1.0]], [1.0], distribution=distribution)
    Table([Entry(z, z, param_id, offset)], ["noise"], backend).apply(do)
    return z
