"""The thresholds of magnitude masks: taken when a run begins, kept as long as it lasts, and looked at now and then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..trajectory import Trajectory
from ..warn import Warner
from .shards import Shard, shard_of
from .tables import Weight, Weights
from .thresholds import Percentile, count_here, magnitude_percentile, too_many, wanted
from .whole import summed_over

_EVERY = 1000  # steps from one look at the shares to the next; it costs less than a pass
_EARLY = 100  # a step with one besides
_FEW = 8  # weights that are to take part, below which a tensor's share says little
_PART = 0.1  # of the weights that are to take part, in tensors whose share is off: from here on it is said
_SMALL = 0.01  # of the weights to be masked, in tensors that are left dense: up to here that is no error


@dataclass(frozen=True, slots=True)
class _Taken:
    """Of a parameter: its threshold, None if it is left dense; of which percentile, None if of a run that goes on."""

    threshold: float | None
    sparsity: float
    percentile: Percentile | None = None


class Thresholds:
    """Of each parameter the h of its mask |θ| <= h.

    A mask is taken anew from the weights in every step, so one by magnitude means nothing for a tensor whose magnitudes
    do not separate, such as LoRA's B, which is all zeros: whatever takes part in the first step has another magnitude
    from then on. Which of the equal ones take part would have to be drawn and then kept, as a bit a weight, for as long
    as the run lasts. Such tensors are left dense instead, and named once.

    Args:
        of_run: of a run that is gone on with, by parameter; None for a dense one.

    Attributes:
        fixed: whether steps were taken, or are being taken, with these. Until then they are those of the weights as
            they are, whenever they came to be.
    """

    def __init__(self, warner: Warner, of_run: Mapping[Tensor, float | None] | None = None):
        self._warner = warner
        self._taken = {p: _Taken(h, math.nan) for p, h in (of_run or {}).items()}
        self.fixed = of_run is not None
        self._due = self.fixed  # whether the next step looks at the shares
        self._masking = any(taken.threshold is not None for taken in self._taken.values())
        self._sparsities: list[float] = []  # of the groups, when they were fixed
        self._changes = 0  # by others
        self._drifted = False  # whether weights are past their thresholds because the run moved them there

    @classmethod
    def of_trajectory(cls, warner: Warner, by_name: Mapping[str, Tensor], run: Trajectory) -> Thresholds:
        """Those that the run was recorded with, of what is frozen by its end, too."""
        every = [w for _, setup in run.setups for w in setup.weights]
        found = cls(warner, {by_name[w.name]: w.threshold for w in every if w.name in by_name})
        found._due = False  # the weights come out of a replay of it
        return found

    @classmethod
    def of_state(cls, warner: Warner, parameters: Sequence[Tensor], run: Mapping[str, Any]) -> Thresholds:
        """Those in a checked state. One of no step has none that any step was taken with; one of a parameter that is
        frozen, if there is none, is yet to be taken.
        """
        if not run["step_count"]:
            return cls(warner)
        heights = zip(parameters, run["thresholds"], strict=True)
        return cls(warner, {p: h for p, h in heights if h is not None or p.requires_grad})

    def get(self, p: Tensor) -> float | None:
        """The threshold of p, None if it has none, or not yet."""
        taken = self._taken.get(p)
        return None if taken is None else taken.threshold

    def take(self, p: Tensor, shard: Shard, sparsity: float) -> float | None:
        """The threshold of p: from now on this one."""
        if p not in self._taken:
            n, sparsity = math.prod(shard.whole), checks.number("sparsity", sparsity, 0.0, 1.0, open_high=True)
            if wanted(n, sparsity) == n:  # all are to take part, whatever they grow to
                self._taken[p] = _Taken(None, sparsity)
            else:
                found = magnitude_percentile(shard, sparsity)
                self._taken[p] = _Taken(found.h if found.separates else None, sparsity, found)
            self._masking |= self._taken[p].threshold is not None
        return self._taken[p].threshold

    def forget_stale(self, groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> bool:
        """Before the first step: forget what is of other weights or another sparsity, and tell whether there was any.

        What was counted is counted again; a version counter would not see what is written to `p.data`.
        """
        if self.fixed:
            return False
        stale = []
        for group in groups:
            for p in group["params"]:
                taken = self._taken.get(p)
                if taken is None:
                    continue
                found = taken.percentile
                if taken.sparsity != group["sparsity"] or (found is not None and not _holds(found, p, names[p])):
                    stale.append(p)
        for p in stale:
            del self._taken[p]
        return bool(stale)

    def name_dense(self, weights: Sequence[Weight], groups: Sequence[Mapping[str, Any]]) -> None:
        """Say which of these weights are left dense though a part of them was to be left out."""
        masked = [w for w in weights if groups[w.row // 2]["sparsity"]]
        dense = [w for w in masked if w.threshold is None and self._is_odd(w, groups[w.row // 2]["sparsity"])]
        if not dense:
            return
        sizes = [sum(math.prod(w.shard.whole) for w in some) for some in (dense, masked)]
        first, others = dense[0], ", ".join(w.name for w in dense[1:4])
        more = f" (also {others}{f' and {len(dense) - 4} more' if len(dense) > 4 else ''})" if others else ""
        said = (
            f"sparsity: {len(dense)} of {len(masked)} tensors, with {_percent(*sizes)} of the weights, "
            f"{'is' if len(dense) == 1 else 'are'} left dense: {self._reason(first)}{more}. To say that this is meant, "
            "give them a parameter group with sparsity=0"
        )
        about = f"sparsity: dense: {[w.name for w in dense]}"
        if sizes[0] > _SMALL * sizes[1]:
            self._warner.warn(about, said)
        else:  # a new head's bias
            self._warner.note(about, said)

    def _is_odd(self, w: Weight, sparsity: float) -> bool:
        size = math.prod(w.shard.whole)
        return w.parameter in self._taken and wanted(size, sparsity) < size

    def _reason(self, w: Weight) -> str:
        found = self._taken[w.parameter].percentile
        if found is None:
            return f"{w.name} was, in the run that is gone on with"
        return (
            "a mask by magnitude means nothing where magnitudes do not separate, and of "
            f"{w.name} {_percent(found.upto, found.size)} have |θ| <= {found.h:.3g}, where "
            f"{_percent(found.wanted, found.size)} are to take part"
        )

    def look(self, weights: Weights, groups: Sequence[Mapping[str, Any]], step: int, changed: bool) -> None:
        """Before each step, all ranks together: fix the thresholds, and now and then count what takes part by them.

        Args:
            weights: of the step.
            groups: of the optimizer.
            step: steps taken before.
            changed: whether somebody else has changed weights since the last step.

        Raises:
            ValueError: others have changed weights so that shares are far off, and the optimizer is strict. No weight has
                moved.
        """
        self.fixed = True
        given = [group["sparsity"] for group in groups]
        if given != self._sparsities:
            self._check_sparsities(given)
        if not self._masking:
            return
        if changed:
            self._changes += 1
            self._due |= self._changes & (self._changes - 1) == 0  # they may do so in every step
        if (self._due or (step and (step == _EARLY or step % _EVERY == 0))) and not self._drifted:
            self._check_shares(weights, groups)
            self._due = False

    def _check_sparsities(self, given: list[float]) -> None:
        """That of a group which was added counts, a later change of one does not."""
        known = self._sparsities
        for i, (had, has) in enumerate(zip(known, given, strict=False)):
            if had != has:
                self._warner.warn(
                    f"sparsity: {i}",
                    f"param_groups[{i}].sparsity: it was changed from {had} to {has}, which has no effect: a run keeps "
                    "the thresholds that it began with; make the optimizer anew",
                )
        self._sparsities = [*known, *given[len(known) :]]

    def _check_shares(self, weights: Weights, groups: Sequence[Mapping[str, Any]]) -> None:
        about = "sparsity: shares"
        masked = [w for w in weights.weights if w.threshold is not None and groups[w.row // 2]["sparsity"]]
        if not masked:
            return
        sizes = [math.prod(w.shard.whole) for w in masked]
        due = [wanted(n, groups[w.row // 2]["sparsity"]) for n, w in zip(sizes, masked, strict=True)]
        here = torch.stack([count_here(w.shard, w.threshold or 0.0) for w in masked])
        counts = summed_over([w.shard for w in masked], here).tolist()
        off = [
            i
            for i, (n, r, count) in enumerate(zip(sizes, due, counts, strict=True))
            if r >= _FEW and (2 * count < r or too_many(n, r, count))
        ]
        if sum(due[i] for i in off) <= _PART * sum(due):
            return
        i = max(off, key=lambda i: due[i])
        w = masked[i]
        said = (
            f"sparsity: {_percent(sum(counts), sum(sizes))} of the weights of masked tensors take part, where "
            f"{_percent(sum(due), sum(sizes))} are to: {len(off)} of {len(masked)} tensors are off by more than a "
            f"factor of 2, and of {w.name} {_percent(counts[i], sizes[i])} have |θ| <= {w.threshold:.3g}. "
        )
        if self._changes and self._due:
            self._warner.warn(
                about,
                f"{said}Something else than the optimizer changed the weights, and a run keeps the thresholds that it "
                "began with; to take new ones, make the optimizer anew, with the weights in place",
            )
        else:  # it is the method, as published
            self._drifted = True
            self._warner.note(
                about,
                f"{said}Weights that grow past their threshold take no part any more, fewer of them with a smaller lr; "
                "or they are not those that the thresholds were taken of. To take new ones, make the optimizer anew",
            )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %"


def _holds(known: Percentile, p: Tensor, name: str) -> bool:
    """Whether it is that of the weights as they are."""
    if p.is_meta:
        return True
    shard = shard_of(name, p)
    counts = torch.stack([count_here(shard, known.h, below=True), count_here(shard, known.h)])
    return math.prod(shard.whole) == known.size and shard.summed(counts).tolist() == [known.below, known.upto]
