"""Decides which evaluations are watched for weights that are read outside of their module.

To watch every operation takes 5 % of a forward, or 10 ms. So an evaluation is watched only for a reason, and reasons
are cheap to see. If one appears during an evaluation that was not watched, the evaluation is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..aliases import Aliases
from ..owners import Owners
from .seals import Seals

_SAMPLED = 64  # one step in so many is watched without a reason
_MAX_PATIENCE = 1024  # evaluations
# These modules inspect the classes of their weights, and take another path for sealed ones, which rounds differently.
_INSPECTING = nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention
_64_BITS = 2**64 - 1

_Key = tuple["nn.Module | type[nn.Module]", bool]


def is_sampled(seed: int, step: int) -> bool:
    """Whether a step is in the random sample that is watched without a reason, to find reads that leave no sign."""
    mixed = (seed ^ step * 0x9E3779B97F4A7C15) & _64_BITS  # as in SplitMix64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    return (mixed >> 32) % _SAMPLED == 0


def _is_opaque(m: nn.Module) -> bool:
    """Whether sealed weights miss the reads of a module, or change what it does."""
    # TorchScript ignores classes. nn.TransformerEncoder checks for `__torch_function__`, and pads differently then.
    return isinstance(m, torch.jit.ScriptModule) or type(m).forward is nn.TransformerEncoder.forward


class WatchPolicy:
    """Remembers what watched evaluations looked like, and notices evaluations that look different.

    Args:
        weights, own: see `Aliases`.
        owners: the modules and their weights.

    Attributes:
        seals: those of the weights.
        may_seal: whether weights may be sealed in watched evaluations, too.
        suspicious: set to True by anyone who sees a sign of reads elsewhere in an evaluation.
        wrote: weights that watched evaluations have written to.
        broken: whether a weight was used outside of its module in an evaluation that was not watched.
        watched, not_watched: the last step with an evaluation that was watched, or not watched; -1 for none.
    """

    def __init__(self, weights: Sequence[Tensor], own: Sequence[Tensor], owners: Owners):
        self._owners = owners
        self._aliases = Aliases(weights, own)
        self.seals = Seals(weights)
        self.suspicious = self.broken = False
        self.wrote: set[int] = set()
        self.watched = self.not_watched = -1
        self._version = -1  # the `owners.version` for which the following holds
        self._opaque, self.may_seal = False, True
        self._known: set[tuple[_Key | None, _Key | None]] = set()  # pairs of modules that ran one after the other
        # The modules of the last evaluation: their ids, their modes, and which are outside the tree.
        self._last: tuple[list[int], list[bool], list[tuple[int, type[nn.Module]]]] | None = None
        self._left, self._patience = 0, 1  # evaluations still to be watched, and how many the next repetition adds

    def must_watch(self) -> bool:
        """Whether the next evaluation must be watched: the modules are unknown, or seals would miss reads."""
        if self._version != self._owners.version:  # there are other modules
            self._known.clear()
            self._last = None
            self._opaque = any(map(_is_opaque, self._owners.members))
            self.may_seal = not any(isinstance(m, _INSPECTING) for m in self._owners.members)
        # Seals do not notice operations on aliases.
        return not self._known or self._opaque or not self.seals.complete or self._aliases.exist()

    def should_watch(self) -> bool:
        """Whether to watch the next evaluation because recent ones were repeated for signs that meant nothing."""
        return self._left > 0

    def take_findings(self) -> tuple[set[int], bool]:
        """Return `wrote` and `broken`, and reset both."""
        found = self.wrote.copy(), self.broken or self.seals.broken
        self.wrote.clear()
        self.broken = self.seals.broken = False
        return found

    def begin(self) -> None:
        """Begin an evaluation."""
        self.suspicious = self.seals.broken = False

    def saw_signs(self, ran: Sequence[nn.Module]) -> bool:
        """Whether the evaluation that has ended, in which the modules `ran` in this order, should have been watched."""
        self.broken |= self.seals.broken
        return self.suspicious or self.seals.broken or self._is_new(ran)

    def _is_new(self, ran: Sequence[nn.Module]) -> bool:
        """Whether modules followed each other as in no watched evaluation."""
        members, ids, training = self._owners.members, [*map(id, ran)], [m.training for m in ran]
        if self._last is not None and training == self._last[1]:
            for at, kind in self._last[2]:  # such as a loss function that is created anew in every call
                if type(ran[at]) is kind and ran[at] not in members:
                    ids[at] = 0
            if ids == self._last[0]:
                return False
        if not self._pairs(ran) <= self._known:
            return True
        strangers = [(at, type(m)) for at, m in enumerate(ran) if m not in members]
        ids = [id(m) if m in members else 0 for m in ran]  # ids are only unique for modules that live on
        self._last = ids, training, strangers
        return False

    def _pairs(self, ran: Iterable[nn.Module]) -> set[tuple[_Key | None, _Key | None]]:
        """The pairs of modules that follow each other: the same for any number of turns of a loop.

        Modules outside the tree may be new in each call, so they count by their class.
        """
        members = self._owners.members
        keys: list[_Key] = [(m if m in members else type(m), m.training) for m in ran]
        return set(zip([None, *keys], [*keys, None], strict=True))

    def skip(self, step: int) -> None:
        """Note that an evaluation was not watched."""
        self.not_watched = step

    def learn(self, ran: Sequence[nn.Module], step: int, again: bool) -> None:
        """Learn what a watched evaluation looks like in which all reads were right.

        Args:
            ran: the modules in the order in which they ran.
            step: the step of the evaluation.
            again: whether it repeated an evaluation, for signs that meant nothing.
        """
        new = bool(self._known) and self._is_new(ran)
        self._known |= self._pairs(ran)
        self._version, self.watched = self._owners.version, step
        if again:  # watch ever longer series of evaluations from the start, so that ever fewer are repeated
            self._left, self._patience = self._patience, min(2 * self._patience, _MAX_PATIENCE)
        elif self.suspicious or new:
            self._left = max(self._left, 1)
        elif self._left:
            self._left -= 1
