"""The trainable weights of an optimizer as tables of the primitive, and moves through weight space as fused passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.types import Entry, MaskKind, Pass
from ..ops import Table


@dataclass(frozen=True, slots=True)
class Weight:
    """One trainable parameter, and how the passes treat it."""

    name: str
    tensor: Tensor
    param_id: int
    row: int  # of Pass.scales and Pass.decays
    block: int | None = None  # transformer block, None if the parameter always takes part
    threshold: float | None = None  # only |w| <= threshold takes part


class Weights:
    """Tables over the same weights: the first pass of a step records the masks of clean weights, later ones use them.

    Args:
        weights: all of one device; their tensors are changed in place.
        rows: how many rows of scales and decays there are.
        stochastic: rounding of 16-bit weights.
        anchors: for each weight a snapshot that passes may start from instead, or None.
        backend: see `add_noise_`.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        rows: int,
        stochastic: bool,
        anchors: Sequence[Tensor] | None,
        backend: str | None,
    ):
        self.weights, self.rows, self.stochastic = tuple(weights), rows, stochastic
        bits = [
            None
            if w.threshold is None
            else torch.zeros((w.tensor.numel() + 7) // 8, dtype=torch.uint8, device=w.tensor.device)
            for w in weights
        ]

        def table(sources: Sequence[Tensor], kind: MaskKind) -> Table:
            entries = [
                Entry(w.tensor, src, w.param_id, 0, w.row)
                if w.threshold is None
                else Entry(w.tensor, src, w.param_id, 0, w.row, kind, w.threshold, b)
                for w, src, b in zip(weights, sources, bits, strict=True)
            ]
            return Table(entries, [w.name for w in weights], backend)

        own = [w.tensor for w in weights]
        sparse = any(b is not None for b in bits)
        self._in_place = table(own, MaskKind.BITS)
        self._in_place_recording = table(own, MaskKind.RECORD) if sparse else self._in_place
        self._from_anchor = self._from_anchor_recording = None
        if anchors is not None:
            self._from_anchor = table(anchors, MaskKind.BITS)
            self._from_anchor_recording = table(anchors, MaskKind.RECORD) if sparse else self._from_anchor

    def active(self, dropped: frozenset[int]) -> list[int] | None:
        """Indices of the weights outside the dropped blocks, None for all."""
        if not dropped:
            return None
        return [i for i, w in enumerate(self.weights) if w.block not in dropped]

    def move(
        self,
        deltas: Mapping[int, float | Sequence[float]],
        *,
        decays: Sequence[float] | None = None,
        active: Sequence[int] | None = None,
        record: bool = False,
        from_anchor: bool = False,
    ) -> None:
        """One pass: w <- round(decay * (w or anchor) + m . sum delta[seed] * z(seed)).

        Args:
            deltas: seed -> scale, or a scale for each row.
            decays: for each row; None for 1.
            active: indices of the weights that take part, None for all.
            record: take the masks from the weights (or anchors) that this pass reads, and keep them.
            from_anchor: start from the anchors instead of the weights.
        """
        by_row = [[d if isinstance(d, float) else d[r] for d in deltas.values()] for r in range(self.rows)]
        if from_anchor:
            table = self._from_anchor_recording if record else self._from_anchor
        else:
            table = self._in_place_recording if record else self._in_place
        assert table is not None
        table.apply(Pass(list(deltas), by_row, list(decays or [1.0] * self.rows), self.stochastic, active))


class Excursion:
    """Weights that have left θ: `offset` says by which multiples of which directions. Every move is one pass."""

    def __init__(self, weights: Weights, active: Sequence[int] | None, *, record: bool = True):
        self._weights, self._active, self._record = weights, active, record
        self.offset: dict[int, float] = {}

    def to(self, offset: Mapping[int, float]) -> None:
        """Go to θ + sum offset[seed] * z(seed)."""
        seeds = [*self.offset, *(s for s in offset if s not in self.offset)]
        deltas = {s: offset.get(s, 0.0) - self.offset.get(s, 0.0) for s in seeds}
        deltas = {s: d for s, d in deltas.items() if d != 0.0}
        if deltas:
            self._weights.move(deltas, active=self._active, record=self._record)
            self._record = False
        self.offset = dict(offset)

    def finish(self, update: Mapping[int, Sequence[float]], decays: Sequence[float]) -> None:
        """Restore and update in one pass: θ <- decay * θ + sum update[seed] * z(seed), for each row.

        With w = θ + offset * z, that is decay * w + (update - decay * offset) * z.
        """
        zero = [0.0] * len(decays)
        seeds = [*self.offset, *(s for s in update if s not in self.offset)]
        deltas = {
            s: [u - d * self.offset.get(s, 0.0) for u, d in zip(update.get(s, zero), decays, strict=True)]
            for s in seeds
        }
        self._weights.move(deltas, decays=decays, active=self._active)
        self.offset = {}
