"""Lets the ranks of a process group take every step together. They exchange losses, never weights or gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from .. import checks
from ..backends.pending import Pending
from ..backends.transfer import on_device
from ..closures.losses import OutOfRange, Pair, Refused
from ..weights.fingerprints import sums_here
from ..weights.rows import Value, device_of, divided, stacked
from ..weights.shards import Shard
from .channel import HEAD, RankLost, channel_of, hash64
from .messages import differences, minority, named, packed, unpacked, values_by_rank

SPLITS = ("auto", "batch", "directions", "off")
# A message is a head of HEAD words, then losses. Word 0: steps taken, number of the exchange within the step, and what
# the sender does. Word 1: digest of the options and values that ranks must agree on. Words 2, 3: which elements of the
# weights the sender holds, and their sum. What a sender does, by its code:
_DOES = ("it takes a step",) * 3 + (
    "its optimizer is new, or has new options",
    "it cannot begin a step",
    "it resumes a trajectory",
    "it takes a step",
)
_FINE, _NOT_FINITE, _RAISED, _AGREE, _FAILED, _READ, _REJECTED = range(7)
_AHEAD = 64  # how many steps the host may be ahead of a device
_RESTART = "restart all ranks and resume the trajectory"
T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """How the ranks of a process group share the work of a step. Their weights stay equal, bit for bit.

    Args:
        split: "batch": all ranks evaluate the same directions, each on its own part of the batch; (L+, L-) of a
            direction is the mean over the ranks. "directions": each rank evaluates its own of the step's directions, on
            whatever batch it likes; perturbation is in the forward then, since weights that were moved along different
            directions in place would be rounded differently.
        process_group: None for the default one. All its ranks must take every step.
        check_every: every `check_every` steps the ranks compare fingerprints of their weights; 0 for never. If weights
            are sharded, only copies of the same shard are compared.
        timeout: how many seconds ranks wait for one that does not come; then all others raise `RankLost`. Choose it
            longer than anything that one rank does alone between steps. If a rank's process has ended, the others
            notice within seconds, provided that it shared a machine with one of them or its connection was closed.
    """

    split: str = "batch"
    process_group: Any = None
    check_every: int = 100
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        checks.choice("parallel: split", self.split, SPLITS)
        checks.integer("parallel: check_every", self.check_every, 0)
        checks.number("parallel: timeout", self.timeout, 0.0, 1e8, open_low=True)


def ranks_of(parallel: str | Parallel) -> Ranks | None:
    """Return the ranks that take steps together; None if this process takes its steps alone.

    Raises:
        TypeError, ValueError: `parallel` is neither a `Parallel` nor one of SPLITS, or there is no process group.
    """
    if not isinstance(parallel, Parallel):
        checks.choice("parallel", parallel, SPLITS)
        parallel = Parallel(parallel)
    there = distributed.is_available() and distributed.is_initialized()
    if parallel.split == "auto":
        alone = not there or distributed.get_world_size(parallel.process_group) == 1
        return None if alone else Ranks(replace(parallel, split="batch"))
    if parallel.split == "off":
        return None
    if not there:
        raise ValueError(
            f"parallel: expected a process group (see torch.distributed.init_process_group) for {parallel.split!r}, "
            "got none"
        )
    return Ranks(parallel)


class RanksDiffer(RuntimeError):
    """The ranks no longer take the same step from the same weights. Restart them all, and `resume` the trajectory."""


class RankRaised(RuntimeError):
    """Another rank could not do its part of a step, and reported that."""


class Ranks:
    """One rank's side of all exchanges with the other ranks.

    Attributes:
        how: the options that the user gave.
        rank, size: of the process group.
        bytes_sent: how many bytes this rank has sent to each of the others, in all steps so far.
    """

    def __init__(self, how: Parallel):
        self.how = how
        self.rank = distributed.get_rank(how.process_group)
        if self.rank < 0:
            raise ValueError("parallel: expected a process group that this process belongs to, got one without it")
        self.size = distributed.get_world_size(how.process_group)
        self.bytes_sent = 0
        self._pending = Pending()
        self._channel = channel_of(how.process_group)
        self._key: Any = None
        self._options: list[str] = []  # all ranks have agreed on these, and
        self._digest = self._words = 0  # on their digest, and on the length of messages that follows from them
        self._exchange_number = 0  # number of the next exchange within its step

    def __reduce__(self) -> Any:
        return Ranks, (self.how,)

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self.how)  # process groups cannot be copied

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def own(self, seeds: Sequence[T]) -> Sequence[T]:
        """Return the seeds of the directions that this rank evaluates."""
        if self.how.split == "batch":
            return seeds
        each = len(seeds) // self.size
        return seeds[self.rank * each : (self.rank + 1) * each]

    def check_directions(self, directions: int) -> None:
        """Raise ValueError unless this number of directions can be dealt out evenly."""
        if self.how.split == "directions" and directions % self.size:
            raise ValueError(
                f"directions: expected a multiple of {self.size}, the ranks that share them, got {directions}"
            )

    def from_first(self, make: Callable[[], bytes | None]) -> bytes | None:
        """Call `make` on the first rank and return its result on all. If it raises there, every rank raises the same.

        Raises:
            RankLost, RanksDiffer: other ranks do not come, or take a step instead.
        """
        error: Exception | None = None
        made: bytes | None = None
        if self.is_first:
            try:
                made = make()
            except Exception as raised:  # it must reach the others, which wait for a result
                error = raised
        data = packed(made, error) if self.is_first else b""
        rows = self._gather([_READ, 0, len(data), 0], "in resume")
        self._check_heads(rows, [], [], "")
        data = self._channel.from_first(data, rows[0][2], "in resume", self.how.timeout)
        if error is not None:
            raise error
        return made if self.is_first else unpacked(data)

    def begin(self, step: int, key: Any, directions: int, on_gpu: bool, options: Callable[[], list[str]]) -> None:
        """Agree with the other ranks on all options that messages and weights depend on, if they have changed.

        Called before every step, before the step asks other ranks for anything.

        Args:
            step: steps taken before.
            key: changes whenever an option changes.
            directions: of the step.
            on_gpu: whether losses may be on a GPU.
            options: returns texts "name: value" of all that the ranks must have in common.

        Raises:
            RanksDiffer: an option differs (the message says which, and which rank has which value), or another rank
                takes another step.
            RankRaised: another rank cannot take the step.
            RankLost: another rank has gone.
        """
        self._exchange_number = 0
        if key == self._key and self._words == self._channel.words:
            return
        texts = options()
        digest, words = hash64(texts), HEAD + 2 * len(self.own(range(directions)))
        if digest != self._digest or words != self._channel.words:
            when = f"at the start of step {step + 1}"
            try:
                rows = self._gather([step << 8 | _AGREE, digest, words, on_gpu], when)
                self._check_heads(rows, texts, [], f"{self._channel.exchanges}")
                # All ranks have the same `words` now, since it follows from the options. `on_gpu` may differ.
                self._channel.words = words
                self._channel.on_gpu |= self._channel.has_gpus and any(row[3] for row in rows)
            except (RanksDiffer, RankRaised, RankLost):
                raise
            except BaseException as error:
                self._channel.leave(when, error)
                raise
        self._key, self._options, self._digest, self._words = key, texts, digest, words

    @contextmanager
    def reporting_errors(self, step: int) -> Iterator[None]:
        """If this rank cannot begin a step, report that to the other ranks, and raise."""
        try:
            yield
        except (RanksDiffer, RankRaised, RankLost):
            raise
        except Exception as error:
            try:
                self._gather([step << 8 | _FAILED, 0, 0, 0], f"at the start of step {step + 1}")
            except RankLost as lost:
                raise lost from error
            raise

    def exchange(self, pairs: Sequence[Pair], step: int, agreed: Sequence[str], shards: Sequence[Shard]) -> list[Pair]:
        """Exchange losses with the other ranks; return (L+, L-) of each of the step's directions, in their order.

        Args:
            pairs: (L+, L-) of this rank's directions.
            step: steps taken before.
            agreed: texts "name: value" of values that may change in every step and must be equal on all ranks.
            shards: the weights, to be compared in some steps.

        Raises:
            Refused: another rank's losses were not finite.
            RankRaised: another rank's closure raised.
            RanksDiffer: the ranks take different steps, or their options or weights differ; the message says which.
            RankLost: another rank has gone.
        """
        return self._exchange(pairs, _FINE, step, agreed, shards)

    def report_error(self, error: Exception, n: int, step: int, agreed: Sequence[str], shards: Sequence[Shard]) -> None:
        """Report an error to the other ranks, which wait in `exchange`: this rank has no losses for its n directions.

        The others raise. This rank does not: its caller raises `error`.
        """
        outcome = _RAISED
        if isinstance(error, Refused):
            outcome = _NOT_FINITE if error.error is OutOfRange else _REJECTED
        try:
            self._exchange([(math.nan, math.nan)] * n, outcome, step, agreed, shards)
        except RankLost as lost:
            raise lost from error  # the lost rank may be the cause of the error
        except (Refused, RuntimeError):
            pass  # the first error matters more

    def _exchange(
        self, pairs: Sequence[Pair], outcome: int, step: int, agreed: Sequence[str], shards: Sequence[Shard]
    ) -> list[Pair]:
        checking = self.how.check_every > 0 and step % self.how.check_every == 0
        flat = [value for pair in pairs for value in pair]
        where, when = self._channel.device(device_of(*flat)), f"in step {step + 1}"
        number, self._exchange_number = self._exchange_number, self._exchange_number + 1
        digest = hash64([str(self._digest), *agreed])
        numbers = [step << 8 | number << 4 | outcome, digest, _elements_hash(shards) if checking else 0]
        words = [on_device(numbers, torch.int64, where), torch.zeros(1, dtype=torch.int64, device=where)]
        if checking:  # a sum of running sums, so that weights in another order give another result
            words[1] = sums_here(shards).cumsum(0).sum().reshape(1).to(where)
        losses = stacked([v.to(where) if isinstance(v, Tensor) else v for v in flat], where)
        rows = self._channel.rows(torch.cat([*words, losses.view(torch.int64)]), when, self.how.timeout)
        self.bytes_sent += rows[0].numel() * 8
        heads, everybodys = rows[:, :HEAD], rows[:, HEAD:].view(torch.float64)
        stays = device_of(*flat) == where
        texts, event = (self._options, agreed), f"{self._channel.exchanges}"
        if stays and not checking:
            # The host does not wait. If ranks differ, NaN makes the device skip the step, and a later call raises.
            differ = (heads[:, :2] != heads[0, :2]).any() | (heads[0, 0] & 15 != _FINE)
            self._pending.put(heads.flatten(), lambda flat: self._check_heads_later(_rows(flat), *texts, event))
            self._pending.work_off(wait=False)
            if (behind := self._pending.oldest()) is not None and len(self._pending) > _AHEAD:
                self._channel.until(behind.query, when, self.how.timeout)
            return self._pairs([list(row.unbind()) for row in torch.where(differ, math.nan, everybodys)])
        known_heads = self._channel.values(heads, when, self.how.timeout)
        self._check_heads(known_heads, *texts, event)
        if checking:
            self._compare_weights(known_heads, shards, f"before step {step + 1}", event)
        outcomes = [row[0] & 15 for row in known_heads]
        if raised := [r for r, outcome in enumerate(outcomes) if outcome == _RAISED]:
            raise RankRaised(f"closure: it raised on {named(raised)}; the weights are restored, on this rank too")
        if rejected := [r for r, outcome in enumerate(outcomes) if outcome == _REJECTED]:
            raise Refused(ValueError, f"its loss was rejected on {named(rejected)}, which says why")
        if not_finite := [r for r, outcome in enumerate(outcomes) if outcome == _NOT_FINITE]:
            raise Refused(OutOfRange, f"expected a finite loss on every rank, got none on {named(not_finite)}")
        if stays:
            return self._pairs([list(row.unbind()) for row in everybodys])
        known = everybodys.tolist()
        if not_finite := [r for r, row in enumerate(known) if not all(map(math.isfinite, row))]:
            raise Refused(OutOfRange, f"expected a finite loss on every rank, got none on {named(not_finite)}")
        return self._pairs(known)

    def _gather(self, head: Sequence[int], when: str) -> list[list[int]]:
        """Exchange heads without losses; return the head of each rank."""
        self.bytes_sent += self._channel.words * 8
        return self._channel.gather(head, when, self.how.timeout)

    def _pairs(self, losses: list[list[Value]]) -> list[Pair]:
        """Make pairs of each rank's losses. All ranks add in the same order, so that they get equal bits."""
        every = losses
        if self.how.split == "batch":
            every = [[divided(sum(of_rank[1:], of_rank[0]), self.size) for of_rank in zip(*losses, strict=True)]]
        return [pair for row in every for pair in zip(row[::2], row[1::2], strict=True)]

    def _check_heads(
        self, rows: Sequence[Sequence[int]], options: Sequence[str], agreed: Sequence[str], event: str
    ) -> None:
        """Raise unless all ranks do the same thing with the same options.

        Args:
            rows: the head of each rank's message.
            options, agreed: this rank's texts "name: value", to find out which of them differ.
            event: a name of this exchange that is equal on all ranks.
        """
        kinds = [row[0] & 15 for row in rows]
        if odd := [r for r, row in enumerate(rows) if row[0] < 0 or row[0] & 15 >= len(_DOES)]:
            raise RanksDiffer(f"ranks: expected messages of one version of zo_kernels, got another from {named(odd)}")
        if _READ in kinds and set(kinds) != {_READ}:
            raise RanksDiffer(f"ranks: they differ: {values_by_rank('', [_DOES[kind] for kind in kinds])}; {_RESTART}")
        if _READ in kinds:
            if rows[0][2] < 0:
                raise RanksDiffer(f"ranks: expected a length from rank 0, got {rows[0][2]}")
            return
        steps = [row[0] >> 8 for row in rows]
        if len(set(steps)) > 1:
            raise RanksDiffer(f"ranks: they differ: {values_by_rank('steps taken: ', steps)}; {_RESTART}")
        if failed := [r for r, kind in enumerate(kinds) if kind == _FAILED]:
            raise RankRaised(f"step {steps[0] + 1}: it could not begin on {named(failed)}, which says why")
        places = [row[0] >> 4 & 15 for row in rows]
        if len({row[1] for row in rows}) > 1 or len(set(places)) > 1 or (_AGREE in kinds and set(kinds) != {_AGREE}):
            # Ranks that have not agreed on their options yet have no other texts.
            others = self._exchange_texts(f"differ/{event}", options if _AGREE in kinds else [*options, *agreed])
            which = differences(others)
            if not which and len(set(places)) > 1:
                which = [values_by_rank("evaluations before in this step: ", places)]
            if not which and len(set(kinds)) > 1:
                which = [values_by_rank("", [_DOES[kind] for kind in kinds])]
            what = "; ".join(which) or f"other options on {named(minority([row[:2] for row in rows]))}"
            raise RanksDiffer(
                f"ranks: they differ before step {steps[0] + 1}: {what}; create the same optimizer on all of them"
            )

    def _check_heads_later(
        self, rows: Sequence[Sequence[int]], options: Sequence[str], agreed: Sequence[str], event: str
    ) -> None:
        """Check the heads of a step that was taken or skipped before they could be read."""
        self._check_heads(rows, options, agreed, event)
        if raised := [r for r, row in enumerate(rows) if row[0] & 15 in (_RAISED, _REJECTED)]:
            raise RankRaised(
                f"closure: it raised on {named(raised)} in step {(rows[0][0] >> 8) + 1}, which the other ranks have "
                f"counted as skipped; {_RESTART}"
            )

    def _compare_weights(self, rows: Sequence[Sequence[int]], shards: Sequence[Shard], before: str, event: str) -> None:
        """Raise RanksDiffer if ranks that hold the same elements have different values."""
        for elements in dict.fromkeys(row[2] for row in rows):
            holders = [r for r, row in enumerate(rows) if row[2] == elements]
            if odd := [holders[i] for i in minority([rows[r][3] for r in holders])]:
                which = self._other_weights(shards, odd, [r for r in holders if r not in odd], event)
                raise RanksDiffer(
                    f"ranks: expected equal weights {before}, got others on {named(odd)}{which}; {_RESTART}"
                )

    def _other_weights(self, shards: Sequence[Shard], odd: Sequence[int], others: Sequence[int], event: str) -> str:
        """Say which weights of the odd ranks differ from those of other ranks that hold the same elements."""
        mine = [f"{s.name}: {total}" for s, total in zip(shards, sums_here(shards).tolist(), strict=True)]
        every = self._exchange_texts(f"weights/{event}", mine)
        found = differences([every[odd[0]], every[others[0]]])
        wrong = [text.partition(": ")[0] for text in found]
        if not wrong:
            return ""
        return f", in {', '.join(wrong[:3])}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")

    def _exchange_texts(self, name: str, mine: Sequence[str]) -> list[list[str] | None]:
        """Exchange texts; return those of each rank, None for a rank whose texts did not come or are invalid."""
        found: list[list[str] | None] = []
        for text in self._channel.texts(name, json.dumps(list(mine))):
            read: Any = None
            with suppress(ValueError, RecursionError):
                read = json.loads(text or "")
            valid = isinstance(read, list) and all(isinstance(line, str) for line in read)
            found.append(read if valid else None)
        return found


def _rows(flat: Sequence[int]) -> list[list[int]]:
    return [list(flat[i : i + HEAD]) for i in range(0, len(flat), HEAD)]


def _elements_hash(shards: Sequence[Shard]) -> int:
    """Return a hash that is equal on ranks that hold the same elements of the weights."""
    return hash64([f"{s.name} {s.starts} {tuple(s.tensor.shape)}" for s in shards])
