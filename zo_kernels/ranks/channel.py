"""What ranks say to each other: messages of a size that all of them know, and waits that end, with a name."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, distributed

from ..backends.transfer import on_device
from .wording import named

HEAD = 4  # words of every message
_FIRST = HEAD + 4  # of the first ones, which say who their sender is
_SLICE = timedelta(seconds=1)  # of a wait; in between somebody may be found to be lost, or Ctrl-C be heard
_ANSWER = 10.0  # seconds for ranks to answer, or their text to come, once something is wrong
_PIECE = 2**24  # bytes that are sent at once
_TEXT = 2**20  # characters


class RankLost(RuntimeError):
    """A rank has died, or does not come to where the others wait; it is named. The weights here are whole. Restart all
    ranks, and `resume` the trajectory.
    """


class Channel:
    """Between the ranks of a process group; one for all optimizers that use the group, since the size of a message
    must be known to whoever receives it.

    Attributes:
        words: 64 bits each, of a message. All ranks change it at once, when all have told that they want to.
        on_gpu: whether messages are sent from GPUs; likewise.
        exchanges: messages so far.
    """

    def __init__(self, group: Any):
        self._group = ref(group)  # whoever uses the channel has it
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        served = distributed.get_backend_config(group)  # such as cpu:gloo,cuda:nccl
        self._on_cpu, self.has_gpus = "cpu:" in served, "cuda:nccl" in served
        self.words, self.on_gpu, self.exchanges = _FIRST, not self._on_cpu and self.has_gpus, 0
        self._lost: str | None = None
        self._peers: list[list[int]] | None = None  # of each rank: host, process, when that began, any number
        self._myself = [*_this_process(), struct.unpack("<q", os.urandom(8))[0]]
        self._store = _store_of(group)
        self._prefix = "zo_kernels/first"

    def device(self, losses: torch.device | None = None) -> torch.device:
        """Where a message is made: with the losses, if messages are sent from there."""
        if not self.on_gpu:
            return torch.device("cpu")
        on_gpu = losses is not None and losses.type == "cuda"
        return losses if on_gpu and losses else torch.device("cuda", torch.cuda.current_device())

    def gather(self, head: Sequence[int], when: str, timeout: float) -> list[list[int]]:
        """Everybody's head, and nothing else.

        Raises:
            RankLost: see `rows`.
        """
        where = self.device()
        tail = self._myself if self._peers is None else []
        padding = [0] * (self.words - len(head) - len(tail))
        rows = self.rows(on_device([*head, *tail, *padding], torch.int64, where), when, timeout)
        told = self.values(rows, when, timeout)
        if self._peers is None:
            self._peers = [row[HEAD:] for row in told]
            self._prefix = f"zo_kernels/{word([repr(self._peers)]) & (2**64 - 1):x}"
        return [row[:HEAD] for row in told]

    def rows(self, message: Tensor, when: str, timeout: float) -> Tensor:
        """Everybody's message, a row each. On a GPU nobody waits for it.

        Args:
            message: int64 (words,), where `device` says.
            when: such as "in step 8", for errors.
            timeout: seconds.

        Raises:
            RankLost: a rank has ended, or did not come within `timeout` seconds.
        """
        rows = message.new_empty(self.size, message.numel())
        self.exchanges += 1
        options = distributed.distributed_c10d.AllgatherOptions()
        self._collective("allgather", [[*rows.unbind()]], [message], options, when, timeout)
        return rows

    def values(self, t: Tensor, when: str, timeout: float) -> Any:
        """As numbers, once they are known."""
        if t.is_cuda:
            event = torch.cuda.current_stream(t.device).record_event()
            self.until(event.query, when, timeout)
        return t.tolist()

    def from_first(self, data: bytes, n: int, when: str, timeout: float) -> bytes:
        """The first rank's `n` bytes; those that the others give are not looked at."""
        pieces = []
        for begin in range(0, n, _PIECE):
            length = min(_PIECE, n - begin)
            piece = torch.empty(length, dtype=torch.uint8, device="cpu")
            if self.rank == 0:
                piece.copy_(torch.frombuffer(bytearray(data[begin : begin + length]), dtype=torch.uint8))
            piece = piece.to(self.device())
            options = distributed.distributed_c10d.BroadcastOptions()
            options.rootRank = 0
            self._collective("broadcast", [piece], options, when, timeout)
            self.values(piece[:1], when, timeout)
            pieces.append(bytes(piece.cpu().numpy()))
        return b"".join(pieces)

    def _collective(self, name: str, *args: Any) -> None:
        """One of the process group's own, the last of whose arguments are options, `when` and a timeout.

        Unlike those of torch.distributed they can be given a timeout, without which this process would not end for half
        an hour if a rank did not come.
        """
        *tensors, options, when, timeout = args
        if self._lost is not None:
            raise RankLost(self._lost)
        options.timeout = timedelta(seconds=timeout)
        deadline = time.monotonic() + timeout
        try:
            work = getattr(self._group(), name)(*tensors, options)
        except RuntimeError as error:
            self._failed(error, deadline, when, timeout)
        if tensors[-1][0].is_cuda:
            work.wait()  # for its place in the stream, not for its end
            return
        try:
            while not self._ends(work, deadline, when, timeout):
                self._look_around(when, deadline, timeout)
        except RankLost:
            raise
        except BaseException as error:
            self.leave(when, error)
            raise

    def _ends(self, work: Any, deadline: float, when: str, timeout: float) -> bool:
        """Whether it does so soon."""
        try:
            work.wait(_SLICE)
            return True
        except RuntimeError:
            if not work.is_completed():
                return False
        try:
            work.wait()  # it may have come to its end just now
            return True
        except RuntimeError as error:
            self._failed(error, deadline, when, timeout)

    def leave(self, when: str, error: BaseException) -> None:
        """Tell that an exchange was interrupted, so that this rank does not know what the others have agreed on."""
        self._tell("alarm", "")
        told = f"lost rank {self.rank} {when}: it left an exchange ({type(error).__name__})"
        self._lost = _of_the_lost(self._tell("lost", told, first=True))

    def _failed(self, error: RuntimeError, deadline: float, when: str, timeout: float) -> NoReturn:
        late = time.monotonic() > deadline - 0.1
        self._lose(when, timeout, f"waited for {timeout:g} s" if late else f"the connection failed: {error}")

    def until(self, done: Callable[[], bool], when: str, timeout: float) -> None:
        """Wait for a device.

        Raises:
            RankLost: as `rows`.
        """
        begin = looked = time.monotonic()
        while not done():
            now = time.monotonic()
            time.sleep(min(1e-2, (now - begin) / 16))
            if now - looked > _SLICE.total_seconds():
                self._look_around(when, begin + timeout, timeout)
                looked = now

    def _look_around(self, when: str, deadline: float, timeout: float) -> None:
        """Raise RankLost if there is a reason not to wait any longer."""
        if time.monotonic() > deadline:
            self._lose(when, timeout, f"waited for {timeout:g} s")
        if self._ended() or self._is_told("alarm"):
            self._lose(when, timeout, "")

    def _lose(self, when: str, timeout: float, why: str) -> NoReturn:
        """Find out together who is lost: who has ended, or else who does not answer."""
        self._tell("alarm", why)
        self._tell(f"here/{self.rank}", when)
        deadline = time.monotonic() + min(timeout, _ANSWER)
        others = silent = [r for r in range(self.size) if r != self.rank]
        while (verdict := self._told("lost")) is None:
            ended = self._ended()
            silent = [r for r in others if not self._is_told(f"here/{r}")]
            if ended:
                verdict = f"lost {named(ended)} {when}: {'its process has' if len(ended) == 1 else 'they have'} ended"
            elif self._store is None and time.monotonic() > deadline:
                one_of = "one or more of " if len(others) > 1 else ""
                verdict = f"lost {one_of}{named(others)} {when}: the group's store, which rank 0 may keep, is gone, too"
            elif not silent and why:
                verdict = f"an exchange failed on rank {self.rank} {when}, though all ranks are there"
            elif time.monotonic() > deadline:
                verdict = f"lost {named(silent)} {when}: no answer" if silent else f"an exchange failed {when}"
            if verdict is not None:
                verdict = self._tell("lost", verdict + (f" ({why.splitlines()[0]})" if why else ""), first=True)
                break
            time.sleep(0.05)
        self._lost = _of_the_lost(verdict)
        self._tell(f"heard/{self.rank}", "")
        # Who ends now must not be taken for the one who is lost, nor take the store along before all know.
        deadline = time.monotonic() + 2.0
        proven = bool(self._ended())
        while self._store is not None and time.monotonic() < deadline:
            ended = self._ended()
            if all(r in ended or (r in silent and not proven) or self._is_told(f"heard/{r}") for r in others):
                break
            time.sleep(0.02)
        raise RankLost(self._lost)

    def _ended(self) -> list[int]:
        """Ranks on this host whose processes are no more."""
        return [
            r
            for r, (host, process, began, _) in enumerate(self._peers or [])
            if r != self.rank and host and host == self._myself[0] and _began(process) != began
        ]

    def texts(self, name: str, mine: str) -> list[str | None]:
        """Everybody's text; None of those that did not come. `name` has been used by nobody before.

        The group's store carries them: unlike a collective it serves ranks that are at different places.
        """
        self._tell(f"{name}/{self.rank}", mine[:_TEXT])
        found: list[str | None] = [None] * self.size
        deadline = time.monotonic() + _ANSWER
        while self._store is not None:
            for r in range(self.size):
                if found[r] is None:
                    found[r] = self._told(f"{name}/{r}")
            if None not in found or time.monotonic() > deadline or self._ended():
                break
            time.sleep(0.01)
        self._tell(f"{name}/read/{self.rank}", "")
        # The store may live in one of the processes, which may end as soon as it has been told.
        deadline = time.monotonic() + 2.0
        while not all(self._is_told(f"{name}/read/{r}") for r in range(self.size)) and time.monotonic() < deadline:
            if self._store is None or self._ended():
                break
            time.sleep(0.01)
        return found

    def _tell(self, key: str, text: str, *, first: bool = False) -> str:
        """Leave a text with the store, with `first` only if there is none; what is there then."""
        if self._store is None:
            return text
        try:
            if first:
                return str(self._store.compare_set(f"{self._prefix}/{key}", "", text).decode(errors="replace"))
            self._store.set(f"{self._prefix}/{key}", text)
        except RuntimeError:
            self._store = None  # whoever kept it has ended
        return text

    def _told(self, key: str) -> str | None:
        if self._store is None or not self._is_told(key):
            return None
        try:
            return str(self._store.get(f"{self._prefix}/{key}").decode(errors="replace"))
        except RuntimeError:
            self._store = None
            return None

    def _is_told(self, key: str) -> bool:
        if self._store is None:
            return False
        try:
            return bool(self._store.check([f"{self._prefix}/{key}"]))
        except RuntimeError:
            self._store = None
            return False


_channels: WeakKeyDictionary[Any, Channel] = WeakKeyDictionary()


def channel_of(group: Any) -> Channel:
    """The one of a process group; None is the default one."""
    group = distributed.group.WORLD if group is None else group
    if group not in _channels:
        _channels[group] = Channel(group)
    return _channels[group]


def word(texts: Sequence[str]) -> int:
    """64 bits that stand for them."""
    digest = hashlib.blake2s("\n".join(texts).encode(), digest_size=8).digest()
    return int(struct.unpack("<q", digest)[0])


def _of_the_lost(verdict: str) -> str:
    return f"ranks: {verdict}; the weights here are whole: restart all ranks and resume the trajectory"


def _store_of(group: Any) -> Any:
    """Where the ranks of a group met, None if PyTorch does not tell."""
    with suppress(AttributeError, KeyError, TypeError, RuntimeError, ValueError):
        return distributed.distributed_c10d._world.pg_map[group][1]  # no public way leads there
    return None


def _this_process() -> list[int]:
    """Host (0 if its processes cannot be looked at), process, and when that began."""
    process = os.getpid()
    with suppress(OSError):
        host = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
        if began := _began(process):
            return [word(host), process, began]
    return [0, process, 0]


def _began(process: int) -> int:
    """When it began, in ticks; 0 if there is no such process, or nothing but its exit status."""
    try:
        # Behind the name of the program, which may have any characters in it.
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0
