"""Ranks of a process group that take every step together, and send each other losses alone."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from .. import checks
from ..backends.transfer import on_device
from .losses import Refused
from .numbers import Pair, Value, device_of, divided, stacked
from .pending import Pending
from .shards import Shard
from .whole import sums_here

SPLITS = ("auto", "batch", "directions", "off")
_WORDS = 4  # of a message, before the losses: step and outcome, agreement, place and sum of the weights
_FINE, _REFUSED, _RAISED = range(3)  # outcomes
T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """How the ranks of a process group share the work of a step. Their weights stay equal, bit for bit.

    Args:
        split: "batch": all ranks evaluate the same directions, each on its own part of the batch; (L+, L-) of a
            direction is the mean over the ranks. "directions": each rank evaluates its own of the step's directions, on
            whatever batch it likes; perturbation is in the forward then, since weights that were moved along different
            directions in place would be rounded differently.
        process_group: None for the default one. Every rank of it takes every step.
        check_every: in every so many steps the ranks compare fingerprints of their weights; 0 for never. Of sharded
            weights only copies of the same shard can be compared.
    """

    split: str = "batch"
    process_group: Any = None
    check_every: int = 100

    def __post_init__(self) -> None:
        checks.choice("parallel: split", self.split, SPLITS)
        checks.integer("parallel: check_every", self.check_every, 0)


def ranks_of(parallel: str | Parallel) -> Ranks | None:
    """The ranks that take steps together, None if this process is to work alone.

    Raises:
        TypeError, ValueError: it is neither a `Parallel` nor one of SPLITS, or there is no process group.
    """
    if not isinstance(parallel, Parallel):
        checks.choice("parallel", parallel, SPLITS)
        parallel = Parallel(parallel)
    there = distributed.is_available() and distributed.is_initialized()
    if parallel.split == "auto":
        alone = not there or distributed.get_world_size(parallel.process_group) == 1
        return None if alone else Ranks(Parallel("batch", parallel.process_group, parallel.check_every))
    if parallel.split == "off":
        return None
    if not there:
        raise ValueError(
            f"parallel: expected a process group (see torch.distributed.init_process_group) for {parallel.split!r}, "
            "got none"
        )
    return Ranks(parallel)


class RanksDiffer(RuntimeError):
    """The ranks do not take the same step from the same weights any more. Restart them, and `resume` the trajectory."""


class Ranks:
    """One rank among the others.

    Attributes:
        bytes_sent: by this rank to each of the others, in all steps so far.
    """

    def __init__(self, how: Parallel):
        self.how = how
        self.rank = distributed.get_rank(how.process_group)
        if self.rank < 0:
            raise ValueError("parallel: expected a process group that this process belongs to, got one without it")
        self.size = distributed.get_world_size(how.process_group)
        self.bytes_sent = 0
        self._pending = Pending()
        served = distributed.get_backend_config(how.process_group)  # such as cpu:gloo,cuda:nccl
        self._on_cpu, self._on_gpu = "cpu:" in served, "cuda:nccl" in served

    def __reduce__(self) -> Any:
        return Ranks, (self.how,)

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self.how)  # process groups cannot be copied

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def own(self, seeds: Sequence[T]) -> Sequence[T]:
        """The seeds of the directions that this rank evaluates."""
        if self.how.split == "batch":
            return seeds
        each = len(seeds) // self.size
        return seeds[self.rank * each : (self.rank + 1) * each]

    def check_directions(self, directions: int) -> None:
        """Raise ValueError unless they can be dealt out."""
        if self.how.split == "directions" and directions % self.size:
            raise ValueError(
                f"directions: expected a multiple of {self.size}, the ranks that share them, got {directions}"
            )

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank; if it raises there, every rank raises the same."""
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:  # or the others would wait for what never comes
                made[1] = error
        group = self.how.process_group
        source = 0 if group is None else distributed.get_global_rank(group, 0)
        distributed.broadcast_object_list(made, source, group)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def exchange(self, pairs: Sequence[Pair], step: int, agreed: Sequence[str], shards: Sequence[Shard]) -> list[Pair]:
        """Everybody's (L+, L-): of each of the step's directions, in their order.

        Args:
            pairs: of this rank's directions.
            step: steps taken before.
            agreed: what the losses depend on and all ranks should have in common.
            shards: the weights.

        Raises:
            Refused: another rank's losses were not finite.
            RuntimeError: another rank's closure raised.
            RanksDiffer: the ranks are not at the same step, have not agreed, or have other weights; it says which.
        """
        return self._exchange(pairs, _FINE, step, agreed, shards)

    def tell(self, error: Exception, n: int, step: int, agreed: Sequence[str], shards: Sequence[Shard]) -> None:
        """In place of `exchange`, when there are no losses of the `n` directions because of an error."""
        outcome = _REFUSED if isinstance(error, Refused) else _RAISED
        with suppress(Refused, RuntimeError):  # the error that came first is the one to be told
            self._exchange([(math.nan, math.nan)] * n, outcome, step, agreed, shards)

    def _exchange(
        self, pairs: Sequence[Pair], outcome: int, step: int, agreed: Sequence[str], shards: Sequence[Shard]
    ) -> list[Pair]:
        checking = self.how.check_every > 0 and step % self.how.check_every == 0
        flat = [value for pair in pairs for value in pair]
        where = self._device_for(device_of(*flat))
        numbers = [step << 2 | outcome, _word(agreed), _place(shards) if checking else 0]
        words = [on_device(numbers, torch.int64, where), torch.zeros(1, dtype=torch.int64, device=where)]
        if checking:  # weights that changed places give another sum
            words[1] = sums_here(shards).cumsum(0).sum().reshape(1).to(where)
        losses = stacked([v.to(where) if isinstance(v, Tensor) else v for v in flat], where)
        rows = self._gathered(torch.cat([*words, losses.view(torch.int64)]))
        self.bytes_sent += rows[0].numel() * 8
        heads, everybodys = rows[:, :_WORDS], rows[:, _WORDS:].view(torch.float64)
        stays = device_of(*flat) == where
        if stays and not checking:
            # Nobody waits: ranks that differ change nothing, and are told when that is known.
            differ = (heads[:, :2] != heads[0, :2]).any() | (heads[0, 0] & 3 != _FINE)
            self._pending.put(heads.flatten(), lambda flat: self._compare(_rows(flat), agreed, shards))
            self._pending.work_off(wait=False)
            return self._pairs([list(row.unbind()) for row in torch.where(differ, math.nan, everybodys)])
        told = heads.tolist()
        self._compare(told, agreed, shards, may_ask=True)
        outcomes = [row[0] & 3 for row in told]
        if raised := [r for r, outcome in enumerate(outcomes) if outcome == _RAISED]:
            raise RuntimeError(f"closure: it raised on {_named(raised)}; the weights are restored, on this rank too")
        if refused := [r for r, outcome in enumerate(outcomes) if outcome == _REFUSED]:
            raise Refused(ValueError, f"expected a finite loss on every rank, got none on {_named(refused)}")
        return self._pairs([list(row.unbind()) for row in everybodys] if stays else everybodys.tolist())

    def _device_for(self, losses: torch.device | None) -> torch.device:
        """Where a message is made: with the losses, if the group can send from there."""
        if self._on_gpu and (losses is not None or not self._on_cpu):
            return losses or torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _gathered(self, message: Tensor) -> Tensor:
        """Everybody's message, a row each."""
        rows = message.new_empty(self.size, message.numel())
        distributed.all_gather(list(rows.unbind()), message, group=self.how.process_group)
        return rows

    def _pairs(self, losses: list[list[Value]]) -> list[Pair]:
        """Of each rank's losses. All ranks add in one order, so that their bits are equal."""
        every = losses
        if self.how.split == "batch":
            every = [[divided(sum(of_rank[1:], of_rank[0]), self.size) for of_rank in zip(*losses, strict=True)]]
        return [pair for row in every for pair in zip(row[::2], row[1::2], strict=True)]

    def _compare(
        self, rows: list[list[int]], agreed: Sequence[str], shards: Sequence[Shard], *, may_ask: bool = False
    ) -> None:
        """Raise RanksDiffer if they do. With `may_ask` all of them are here, and can tell what is different."""
        steps = [row[0] >> 2 for row in rows]
        if odd := _odd_ones_out(steps):
            told = ", ".join(f"rank {r} at {steps[r]}" for r in odd)
            raise RanksDiffer(f"ranks: expected all at step {steps[_majority(steps)]}, got {told}")
        before = f"before step {steps[0] + 1}"
        if odd := _odd_ones_out([row[1] for row in rows]):
            which = self._other_options(agreed, odd[0]) if may_ask else ""
            raise RanksDiffer(
                f"ranks: expected the same options, learning rates and parameters {before}, got others on "
                f"{_named(odd)}{which}"
            )
        for place in dict.fromkeys(row[2] for row in rows):
            holders = [r for r, row in enumerate(rows) if row[2] == place]
            if odd := [holders[i] for i in _odd_ones_out([rows[r][3] for r in holders])]:
                which = self._other_weights(shards, odd) if may_ask else ""
                raise RanksDiffer(
                    f"ranks: expected equal weights {before}, got others on {_named(odd)}{which}; restart all ranks "
                    "and resume the trajectory"
                )

    def _other_weights(self, shards: Sequence[Shard], odd: Sequence[int]) -> str:
        """Which weights of the odd ranks differ from those of other holders of the same place."""
        every: list[Any] = [None] * self.size
        mine = _place(shards), sums_here(shards).tolist(), [shard.name for shard in shards]
        distributed.all_gather_object(every, mine, self.how.process_group)
        place, sums, names = every[odd[0]]
        others = [other[1] for r, other in enumerate(every) if other[0] == place and r not in odd]
        wrong = [name for name, a, b in zip(names, sums, others[0], strict=True) if a != b]
        return f", in {', '.join(wrong[:3])}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")

    def _other_options(self, agreed: Sequence[str], odd: int) -> str:
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, list(agreed), self.how.process_group)
        usual = next(other for other in every if other != every[odd])
        pairs = list(zip(every[odd], usual, strict=False))
        return "".join(f": {got}, expected {wanted}" for got, wanted in pairs if got != wanted)


def _rows(flat: Sequence[int]) -> list[list[int]]:
    return [list(flat[i : i + _WORDS]) for i in range(0, len(flat), _WORDS)]


def _word(texts: Sequence[str]) -> int:
    digest = hashlib.blake2s("\n".join(texts).encode(), digest_size=8).digest()
    return int(struct.unpack("<q", digest)[0])


def _place(shards: Sequence[Shard]) -> int:
    """Equal on ranks that hold the same elements."""
    return _word([f"{s.name} {s.starts} {tuple(s.tensor.shape)}" for s in shards])


def _majority(words: Sequence[int]) -> int:
    """The first of those that have what most have; what the first rank has, if two have equally many."""
    counts = Counter(words)
    return max(range(len(words)), key=lambda i: (counts[words[i]], words[i] == words[0]))


def _odd_ones_out(words: Sequence[int]) -> list[int]:
    usual = words[_majority(words)]
    return [i for i, word in enumerate(words) if word != usual]


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
