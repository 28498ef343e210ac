"""Whether an evaluation is to be watched for reads of weights outside of their module.

To watch every operation takes 5 % of a forward, or 10 ms. So an evaluation is watched if there is a cause, which costs
little to see: before it, and else it is done again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..aliases import Aliases
from ..owners import Owners
from .closed import Closing

_EVERY = 64  # steps; which of them is drawn
_LONGEST = 1024  # evaluations
# They look at the classes of weights within them, and take a way that rounds otherwise.
_ASKING = nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention
_64_BITS = 2**64 - 1

_Key = tuple["nn.Module | type[nn.Module]", bool]


def drawn(seed: int, step: int) -> bool:
    """Whether a step is watched without any cause, so that what nothing points to is found in the end."""
    mixed = (seed ^ step * 0x9E3779B97F4A7C15) & _64_BITS  # as splitmix64 does
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    return (mixed >> 32) % _EVERY == 0


def _is_opaque(m: nn.Module) -> bool:
    """Whether closing weights tells nothing of a module, or makes it do something else."""
    # A script asks nobody. This encoder asks whether others are asked, and then pads otherwise.
    return isinstance(m, torch.jit.ScriptModule) or type(m).forward is nn.TransformerEncoder.forward


class Vigilance:
    """Knows what was seen in evaluations that were watched, and what points to something else.

    Args:
        weights, own: see `Aliases`.
        owners: of the weights.
        others: further parameters that only their modules may read.

    Attributes:
        closing: of the weights.
        may_close: whether weights may be closed in evaluations that are watched, too.
        suspicious: set to True by whoever sees a sign in an evaluation.
        wrote: weights that were seen to be written to in evaluations that were watched.
        met: whether a weight was used in one that was not, outside of its module.
        watched, not_watched: the last step with an evaluation that was, or was not; -1 for none.
    """

    def __init__(self, weights: Sequence[Tensor], own: Sequence[Tensor], owners: Owners):
        self._owners = owners
        self._aliases = Aliases(weights, own)
        self.closing = Closing(weights)
        self.suspicious = self.met = False
        self.wrote: set[int] = set()
        self.watched = self.not_watched = -1
        self._version = -1  # of the owners, for which the rest holds
        self._opaque, self.may_close = False, True
        self._known: set[tuple[_Key | None, _Key | None]] = set()  # modules that ran one after the other
        self._last: tuple[list[int], list[bool], list[tuple[int, type[nn.Module]]]] | None = None  # that ran
        self._left, self._patience = 0, 1

    def is_certain(self) -> bool:
        """Whether the next evaluation must be watched."""
        if self._version != self._owners.version:  # other modules
            self._known.clear()
            self._last = None
            self._opaque = any(map(_is_opaque, self._owners.members))
            self.may_close = not any(isinstance(m, _ASKING) for m in self._owners.members)
        # Operations on aliases are not seen by closing.
        return not self._known or self._opaque or not self.closing.complete or self._aliases.exist()

    def is_uneasy(self) -> bool:
        """Whether it should be watched, since it would be done again for nothing, as some before."""
        return self._left > 0

    def take(self) -> tuple[set[int], bool]:
        """`wrote` and `met`, which begin anew."""
        taken = self.wrote.copy(), self.met or self.closing.met
        self.wrote.clear()
        self.met = self.closing.met = False
        return taken

    def begin(self) -> None:
        """An evaluation."""
        self.suspicious = self.closing.met = False

    def saw_signs(self, ran: Sequence[nn.Module]) -> bool:
        """Whether the evaluation that has ended should have been watched, these modules having run in this order."""
        self.met |= self.closing.met
        return self.suspicious or self.closing.met or self._is_new(ran)

    def _is_new(self, ran: Sequence[nn.Module]) -> bool:
        members, ids, training = self._owners.members, [*map(id, ran)], [m.training for m in ran]
        if self._last is not None and training == self._last[1]:
            for at, kind in self._last[2]:  # a loss function that is made anew in every call
                if type(ran[at]) is kind and ran[at] not in members:
                    ids[at] = 0
            if ids == self._last[0]:
                return False
        if not self._pairs(ran) <= self._known:
            return True
        strangers = [(at, type(m)) for at, m in enumerate(ran) if m not in members]
        ids = [id(m) if m in members else 0 for m in ran]  # those of members stay theirs
        self._last = ids, training, strangers
        return False

    def _pairs(self, ran: Iterable[nn.Module]) -> set[tuple[_Key | None, _Key | None]]:
        """Those that follow each other. Loops may take any number of turns; of what is made anew, the class counts."""
        members = self._owners.members
        keys: list[_Key] = [(m if m in members else type(m), m.training) for m in ran]
        return set(zip([None, *keys], [*keys, None], strict=True))

    def skip(self, step: int) -> None:
        """An evaluation was not watched."""
        self.not_watched = step

    def learn(self, ran: Sequence[nn.Module], step: int, again: bool) -> None:
        """From an evaluation that was watched, where all was found to be right.

        Args:
            again: whether it had been done before, for signs that meant nothing.
        """
        new = bool(self._known) and self._is_new(ran)
        self._known |= self._pairs(ran)
        self._version, self.watched = self._owners.version, step
        if again:  # ever more evaluations are watched at once: they are done twice ever less often
            self._left, self._patience = self._patience, min(2 * self._patience, _LONGEST)
        elif self.suspicious or new:
            self._left = max(self._left, 1)
        elif self._left:
            self._left -= 1
