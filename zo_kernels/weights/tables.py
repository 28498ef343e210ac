"""The trained weights as tables of the primitive, and passes that move them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, device

from ..backends.staged import Staging
from ..backends.types import Entry, MaskKind, Pass
from ..interrupts import Call
from ..ops import Table
from .overflow import Reach
from .pinned import pin
from .rows import Row, Value, device_of, vector
from .shards import Shard


@dataclass(frozen=True, slots=True)
class Weight:
    """One trained parameter, and how passes treat it.

    Attributes:
        shard: the part of the parameter that this process holds.
        param_id: the id that its noise depends on.
        row: its row in `Pass.scales` and `Pass.decays`.
        block: index of its transformer block; None if it lies in none, and always takes part.
        threshold: only elements with |w| <= threshold take part; None for all.
    """

    name: str
    parameter: Tensor
    shard: Shard
    param_id: int
    row: int
    block: int | None = None
    threshold: float | None = None

    @property
    def tensor(self) -> Tensor:
        """The elements that this process holds, in a plain tensor: the parameter itself, unless it is sharded."""
        return self.shard.tensor


class Weights:
    """Tables over the trained weights, and passes over them, which change them in place.

    Magnitude masks are taken from unperturbed weights. If passes also read perturbed weights, or weights that have
    moved since the mask was taken, the mask is kept as one bit a weight (`keep_masks`); else every pass computes it.
    Masks that stay for a whole run belong to the parameters (`kept.py`): passes read their bits and never write them.

    Args:
        weights: the weights, all on one device.
        rows: how many rows of scales and decays there are.
        stochastic: whether 16-bit weights are rounded stochastically.
        distribution: of z, one of `spec.DISTRIBUTIONS`.
        anchors: for each weight a snapshot that passes may start from instead, or None.
        keep_masks: see above.
        backend: see `add_noise_`.
        on_write: called after every pass.
        copied_to: the device that modules run on, if it is another. If that is a GPU, the anchors and the masks, which
            are copied to it, move to pinned memory.
        masks: for each weight the bits of the mask that it has in the whole run, None if it is dense; None if masks
            are taken anew in each step.

    Attributes:
        theta: the weights without gradients; they stay on θ while a parameter's `data` points to a copy.
        reach: limits on eps and lr |g| for these dtypes.
        staging: memory for passes over weights that are not contiguous.
        masks_stay: whether masks stay for the whole run.
        torn: whether a pass that is more than one call of a C function has begun and not ended. Signals wait for its
            end, so this stays true only if it failed, or another thread raised an exception in this one.
        overwritten: whether something else wrote to the weights while they were moved.
    """

    torn = overwritten = False

    def __init__(
        self,
        weights: Sequence[Weight],
        rows: int,
        stochastic: bool,
        distribution: str,
        anchors: Sequence[Tensor] | None,
        keep_masks: bool,
        backend: str | None,
        on_write: Callable[[], None] | None = None,
        copied_to: device | None = None,
        masks: Sequence[Tensor | None] | None = None,
    ):
        self.weights, self.rows, self.backend = tuple(weights), rows, backend
        self.stochastic, self.distribution = stochastic, distribution
        self.theta = [w.tensor.detach() for w in weights]
        self.anchors = None if anchors is None else list(anchors)
        self.shards = [w.shard for w in weights]
        self.reach = Reach.of({t.dtype for t in self.theta})
        self.counted = [w.tensor for w in weights if not w.tensor.is_inference()]  # these have version counters
        runs = [shard.runs for shard in self.shards]
        self._on_write = on_write
        self.masks_stay = masks is not None
        self._bits: list[Tensor | None] = list(masks or [])
        if masks is None:
            self._bits = [
                None
                if w.threshold is None or not keep_masks
                else torch.zeros(mask_bytes(w.tensor.numel(), len(starts)), dtype=torch.uint8, device=w.tensor.device)
                for w, starts in zip(weights, runs, strict=True)
            ]
        if copied_to is not None:  # before tables take addresses; masks apart from anchors, which may live longer
            pin(self.anchors or [], copied_to)
            pin([bits for bits in self._bits if bits is not None], copied_to)
        records = not self.masks_stay and any(bits is not None for bits in self._bits)
        names = [w.name for w in weights]
        self.staging = Staging()

        def table(sources: Sequence[Tensor], kind: MaskKind) -> Table:
            dsts = [w.tensor for w in weights]
            entries = [self.entry(i, dsts[i], sources[i], kind) for i in range(len(weights))]
            return Table(entries, names, backend, runs, own_masks=True, staging=self.staging)

        own = [w.tensor for w in weights]
        self._in_place = table(own, MaskKind.BITS)
        self._in_place_recording = table(own, MaskKind.RECORD) if records else self._in_place
        self._from_anchor = self._from_anchor_recording = None
        if anchors is not None:
            self._from_anchor = table(anchors, MaskKind.THRESHOLD)
            self._from_anchor_recording = table(anchors, MaskKind.RECORD) if records else self._from_anchor

    def entry(self, i: int, dst: Tensor, src: Tensor, kind: MaskKind) -> Entry:
        """Return the table's entry that reads weight i from `src` and writes it to `dst`.

        Args:
            kind: where a magnitude mask comes from, if the weight has one.
        """
        w, bits = self.weights[i], self._bits[i]
        if w.threshold is None:
            return Entry(dst, src, w.param_id, 0, w.row)
        if bits is None:
            kind = MaskKind.THRESHOLD
        elif self.masks_stay:
            kind = MaskKind.BITS
        return Entry(dst, src, w.param_id, 0, w.row, kind, w.threshold, bits)

    def versions(self) -> list[int]:
        """Return the version counter of each weight that has one."""
        return [t._version for t in self.counted]

    def bits(self, i: int) -> Tensor | None:
        """Return the kept mask of weight i; None if there is none."""
        return self._bits[i]

    def active(self, dropped: frozenset[int]) -> list[int] | None:
        """Return the indices of the weights outside the dropped blocks, None for all."""
        if not dropped:
            return None
        return [i for i, w in enumerate(self.weights) if w.block not in dropped]

    def describe(
        self,
        deltas: Mapping[Any, Value | Row],
        decays: Row | None,
        active: Sequence[int] | None,
    ) -> Pass:
        """Return the pass that adds delta[seed] * z(seed) for each seed; a delta is one number, or one for each row."""
        if decays is None:
            decays = [1.0] * self.rows
        seeds: Any = list(deltas)
        if (where := device_of(*deltas.values())) is not None:
            columns = [vector([d] * self.rows if isinstance(d, float) else d, where) for d in deltas.values()]
            return Pass(seeds, torch.stack(columns, 1), decays, self.stochastic, active, self.distribution)
        by_row: Any = [[d if isinstance(d, float) else d[r] for d in deltas.values()] for r in range(self.rows)]
        return Pass(seeds, by_row, decays, self.stochastic, active, self.distribution)

    def move(
        self,
        deltas: Mapping[Any, Value | Row],
        *,
        decays: Row | None = None,
        active: Sequence[int] | None = None,
        record: bool = False,
        from_anchor: bool = False,
        then: Sequence[Call] = (),
    ) -> None:
        """Make one pass: w <- round(decay * (w or anchor) + m . sum delta[seed] * z(seed)).

        Args:
            deltas: seed -> scale, or a scale for each row.
            decays: one for each row; None for 1.
            active: indices of the weights that take part, None for all.
            record: take the masks from the weights (or anchors) that this pass reads, and keep them, unless they stay.
            from_anchor: start from the anchors instead of the weights.
            then: C functions that note what the pass did. Either the pass and all of them happen, or nothing does.
        """
        self.run(self.describe(deltas, decays, active), record=record, from_anchor=from_anchor, then=then)

    def run(self, do: Pass, *, record: bool = False, from_anchor: bool = False, then: Sequence[Call] = ()) -> None:
        """Make a pass that `describe` returned; see `move`."""
        if from_anchor:
            table = self._from_anchor_recording if record else self._from_anchor
        else:
            table = self._in_place_recording if record else self._in_place
        assert table is not None
        first: list[Call] = []
        if then and not table.in_c:
            first, then = [partial(setattr, self, "torn", True)], [*then, partial(setattr, self, "torn", False)]
        table.apply(do, then, first)
        self.written()

    def written(self) -> None:
        """Call `on_write`, after a pass; call this again if an exception may have prevented it."""
        if self._on_write is not None:
            self._on_write()


def mask_bytes(n: int, runs: int) -> int:
    """Return the bytes of n bits in equal stretches, each of which begins at a byte."""
    return runs * ((n // runs + 7) // 8)
