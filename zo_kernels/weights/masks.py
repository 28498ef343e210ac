"""The thresholds of magnitude masks: set when a run begins, kept until it ends, and checked now and then."""

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
from .percentiles import Percentile, count_here, far_too_many, magnitude_percentile, target_count
from .shards import Shard, shard_of, summed_over
from .tables import Weight, Weights

_CHECK_EVERY = 1000  # steps between two checks of the shares; a check costs less than a pass
_EARLY_CHECK = 100  # one more check, at this step
_TOO_FEW = 8  # a tensor in which fewer weights should take part is not checked: its share says little
_REPORT_FROM = 0.1  # report when tensors with wrong shares hold this fraction of the weights that should take part
_DENSE_IS_FINE = 0.01  # up to this fraction of the masked weights may be in tensors left dense without an error


@dataclass(frozen=True, slots=True)
class _Threshold:
    """The threshold of one parameter, None if it is left dense, and how it came about.

    `percentile` is None for a threshold that was restored from an earlier run.
    """

    value: float | None
    sparsity: float
    percentile: Percentile | None = None


class Thresholds:
    """The h of each parameter's mask |θ| <= h.

    Every step computes the mask anew from the weights, unless the run keeps that of its first step (`kept.py`).
    Magnitudes that do not separate, as in LoRA's B, which starts as all zeros, therefore give no useful mask: whatever
    takes part in the first step has another magnitude afterwards. To mask such a tensor, one would have to draw which
    of the equal weights take part. Such tensors are left dense instead, and reported once.

    Args:
        of_run: the thresholds of the run to be continued, by parameter; None for a dense parameter.

    Attributes:
        fixed: whether a step has used these thresholds. Before that they follow the weights: if the weights change,
            the thresholds are computed again.
    """

    def __init__(self, warner: Warner, of_run: Mapping[Tensor, float | None] | None = None):
        self._warner = warner
        self._known = {p: _Threshold(h, math.nan) for p, h in (of_run or {}).items()}
        self.fixed = of_run is not None
        self._due = self.fixed  # whether the next step checks the shares
        self._masking = any(t.value is not None for t in self._known.values())
        self._sparsities: list[float] = []  # of the groups, when the thresholds were fixed
        self._changes = 0  # of the weights, by others than the optimizer
        self._drifted = False  # whether the run itself has moved weights past their thresholds

    @classmethod
    def of_trajectory(cls, warner: Warner, by_name: Mapping[str, Tensor], run: Trajectory) -> Thresholds:
        """The thresholds that a run was recorded with, also of parameters that were frozen before its end."""
        every = [w for _, setup in run.setups for w in setup.weights]
        found = cls(warner, {by_name[w.name]: w.threshold for w in every if w.name in by_name})
        found._due = False  # the weights come from a replay of this run
        return found

    @classmethod
    def of_state(cls, warner: Warner, parameters: Sequence[Tensor], run: Mapping[str, Any]) -> Thresholds:
        """The thresholds in a checked state.

        A state from before the first step fixes none. A frozen parameter without a threshold gets one when it is
        unfrozen.
        """
        if not run["step_count"]:
            return cls(warner)
        heights = zip(parameters, run["thresholds"], strict=True)
        return cls(warner, {p: h for p, h in heights if h is not None or p.requires_grad})

    def get(self, p: Tensor) -> float | None:
        """The threshold of p; None if it is dense, or has none yet."""
        known = self._known.get(p)
        return None if known is None else known.value

    def take(self, p: Tensor, shard: Shard, sparsity: float) -> float | None:
        """Return the threshold of p, computing it from its magnitudes the first time; None if p is left dense."""
        if p not in self._known:
            n, sparsity = math.prod(shard.whole), checks.number("sparsity", sparsity, 0.0, 1.0, open_high=True)
            if target_count(n, sparsity) == n:  # all take part, however large they grow
                self._known[p] = _Threshold(None, sparsity)
            else:
                found = magnitude_percentile(shard, sparsity)
                self._known[p] = _Threshold(found.h if found.separates else None, sparsity, found)
            self._masking |= self._known[p].value is not None
        return self._known[p].value

    def forget_stale(self, groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> bool:
        """Before the first step: forget thresholds of weights or sparsities that have changed; return whether any had.

        Weights are compared by counting magnitudes again: a version counter would miss writes to `p.data`.
        """
        if self.fixed:
            return False
        stale = []
        for group in groups:
            for p in group["params"]:
                known = self._known.get(p)
                if known is None:
                    continue
                found = known.percentile
                if known.sparsity != group["sparsity"] or (found is not None and not _holds(found, p, names[p])):
                    stale.append(p)
        for p in stale:
            del self._known[p]
        return bool(stale)

    def name_dense(self, weights: Sequence[Weight], groups: Sequence[Mapping[str, Any]]) -> None:
        """Report which of these weights are left dense although their group has a sparsity."""
        masked = [w for w in weights if groups[w.row // 2]["sparsity"]]
        dense = [w for w in masked if w.threshold is None and self._should_be_masked(w, groups[w.row // 2]["sparsity"])]
        if not dense:
            return
        sizes = [sum(math.prod(w.shard.whole) for w in some) for some in (dense, masked)]
        first, others = dense[0], ", ".join(w.name for w in dense[1:4])
        more = f" (also {others}{f' and {len(dense) - 4} more' if len(dense) > 4 else ''})" if others else ""
        message = (
            f"sparsity: {len(dense)} of {len(masked)} tensors, with {_percent(*sizes)} of the weights, "
            f"{'is' if len(dense) == 1 else 'are'} left dense: {self._reason(first)}{more}. If you intend this, "
            "give them a parameter group with sparsity=0"
        )
        about = f"sparsity: dense: {[w.name for w in dense]}"
        if sizes[0] > _DENSE_IS_FINE * sizes[1]:
            self._warner.warn(about, message)
        else:  # such as a new head's bias
            self._warner.note(about, message)

    def _should_be_masked(self, w: Weight, sparsity: float) -> bool:
        size = math.prod(w.shard.whole)
        return w.parameter in self._known and target_count(size, sparsity) < size

    def _reason(self, w: Weight) -> str:
        found = self._known[w.parameter].percentile
        if found is None:
            return f"{w.name} was dense in the run that is being continued"
        return (
            "their magnitudes do not separate, so no threshold tells small weights from large ones: "
            f"{_percent(found.upto, found.size)} of {w.name} have |θ| <= {found.h:.3g}, but only "
            f"{_percent(found.target, found.size)} should take part"
        )

    def begin_step(
        self, weights: Weights, groups: Sequence[Mapping[str, Any]], step: int, changed: bool, *, count: bool
    ) -> None:
        """Fix the thresholds before a step; in some steps, check how many weights take part.

        All ranks call this together, since the counts are summed over shards.

        Args:
            weights: the tables of the step.
            groups: the optimizer's parameter groups.
            step: steps taken before.
            changed: whether something other than the optimizer has changed weights since the last step.
            count: whether masks are taken anew from the weights, so that the shares may change.

        Raises:
            ValueError: such changes have left far too many or too few weights to take part, and the optimizer is
                strict. No weight has moved.
        """
        self.fixed = True
        given = [group["sparsity"] for group in groups]
        if given != self._sparsities:
            self._check_sparsities(given)
        if not (self._masking and count):
            return
        if changed:
            self._changes += 1
            self._due |= self._changes & (self._changes - 1) == 0  # at 1, 2, 4, 8, ...: it may happen in every step
        if (self._due or (step and (step == _EARLY_CHECK or step % _CHECK_EVERY == 0))) and not self._drifted:
            self._check_shares(weights, groups)
            self._due = False

    def _check_sparsities(self, given: list[float]) -> None:
        """Report groups whose sparsity was changed: only that of a newly added group has an effect."""
        known = self._sparsities
        for i, (had, has) in enumerate(zip(known, given, strict=False)):
            if had != has:
                self._warner.warn(
                    f"sparsity: {i}",
                    f"param_groups[{i}].sparsity: it was changed from {had} to {has}, which has no effect: a run keeps "
                    "the thresholds that it began with; create a new optimizer to change them",
                )
        self._sparsities = [*known, *given[len(known) :]]

    def _check_shares(self, weights: Weights, groups: Sequence[Mapping[str, Any]]) -> None:
        about = "sparsity: shares"
        masked = [w for w in weights.weights if w.threshold is not None and groups[w.row // 2]["sparsity"]]
        if not masked:
            return
        sizes = [math.prod(w.shard.whole) for w in masked]
        due = [target_count(n, groups[w.row // 2]["sparsity"]) for n, w in zip(sizes, masked, strict=True)]
        here = torch.stack([count_here(w.shard, w.threshold or 0.0) for w in masked])
        counts = summed_over([w.shard for w in masked], here).tolist()
        off = [
            i
            for i, (n, r, count) in enumerate(zip(sizes, due, counts, strict=True))
            if r >= _TOO_FEW and (2 * count < r or far_too_many(n, r, count))
        ]
        if sum(due[i] for i in off) <= _REPORT_FROM * sum(due):
            return
        i = max(off, key=lambda i: due[i])
        w = masked[i]
        message = (
            f"sparsity: {_percent(sum(counts), sum(sizes))} of the weights of masked tensors take part instead of "
            f"{_percent(sum(due), sum(sizes))}: {len(off)} of {len(masked)} tensors are off by more than a factor of "
            f"2, and in {w.name} {_percent(counts[i], sizes[i])} have |θ| <= {w.threshold:.3g}. "
        )
        if self._changes and self._due:
            self._warner.warn(
                about,
                f"{message}Something other than the optimizer changed the weights, and a run keeps the thresholds it "
                "began with; for new ones, create the optimizer after the weights are loaded",
            )
        else:  # the published method does so, too
            self._drifted = True
            self._warner.note(
                about,
                f"{message}Weights that grow past their threshold no longer take part (fewer do with a smaller lr), or "
                "the thresholds are of other weights. For new thresholds, create a new optimizer",
            )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %"


def _holds(known: Percentile, p: Tensor, name: str) -> bool:
    """Whether the percentile still holds for the weights as they are now."""
    if p.is_meta:
        return True
    shard = shard_of(name, p)
    counts = torch.stack([count_here(shard, known.h, below=True), count_here(shard, known.h)])
    return math.prod(shard.whole) == known.size and shard.summed(counts).tolist() == [known.below, known.upto]
