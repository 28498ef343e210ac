"""Messages between ranks, with waits that end: a rank that does not come is found out and named."""

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
from .messages import named

HEAD = 4  # words at the beginning of every message
_FIRST = HEAD + 4  # words of the first messages, which also identify their sender
_SLICE = timedelta(seconds=1)  # length of each wait; between two, lost ranks and Ctrl-C are noticed
_ANSWER = 10.0  # seconds that ranks have to answer once something is wrong
_PIECE = 2**24  # bytes sent at once
_TEXT = 2**20  # characters of a text at most


class RankLost(RuntimeError):
    """A rank died, or did not come to where the others wait; the message names it.

    The weights of this rank are whole. Restart all ranks and `resume` the trajectory.
    """


class Channel:
    """Exchanges messages between the ranks of a process group.

    All optimizers that use the group share one channel, since a receiver must know the size of the next message.

    Attributes:
        words: the size of a message in 64-bit words. All ranks change it at the same time, after agreeing to.
        on_gpu: whether messages are sent from GPUs; changes in the same way.
        exchanges: messages so far.
    """

    def __init__(self, group: Any):
        self._group = ref(group)  # the users of the channel keep it alive
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        served = distributed.get_backend_config(group)  # such as cpu:gloo,cuda:nccl
        self._on_cpu, self.has_gpus = "cpu:" in served, "cuda:nccl" in served
        self.words, self.on_gpu, self.exchanges = _FIRST, not self._on_cpu and self.has_gpus, 0
        self._lost: str | None = None
        self._peers: list[list[int]] | None = None  # of each rank: host, process id, its start time, a random number
        self._myself = [*_this_process(), struct.unpack("<q", os.urandom(8))[0]]
        self._store = _store_of(group)
        self._prefix = "zo_kernels/first"

    def device(self, losses: torch.device | None = None) -> torch.device:
        """The device to build a message on: that of the losses if messages are sent from GPUs, otherwise the CPU."""
        if not self.on_gpu:
            return torch.device("cpu")
        on_gpu = losses is not None and losses.type == "cuda"
        return losses if on_gpu and losses else torch.device("cuda", torch.cuda.current_device())

    def gather(self, head: Sequence[int], when: str, timeout: float) -> list[list[int]]:
        """Exchange heads alone; return the head of each rank.

        Raises:
            RankLost: see `rows`.
        """
        where = self.device()
        tail = self._myself if self._peers is None else []
        padding = [0] * (self.words - len(head) - len(tail))
        rows = self.rows(on_device([*head, *tail, *padding], torch.int64, where), when, timeout)
        values = self.values(rows, when, timeout)
        if self._peers is None:
            self._peers = [row[HEAD:] for row in values]
            self._prefix = f"zo_kernels/{hash64([repr(self._peers)]) & (2**64 - 1):x}"
        return [row[:HEAD] for row in values]

    def rows(self, message: Tensor, when: str, timeout: float) -> Tensor:
        """Exchange messages; return one row for each rank. On a GPU the host does not wait for them.

        Args:
            message: int64 (words,), on the device that `device` returns.
            when: where in the run this is, for errors, such as "in step 8".
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
        """Wait for a tensor and return its values."""
        if t.is_cuda:
            event = torch.cuda.current_stream(t.device).record_event()
            self.until(event.query, when, timeout)
        return t.tolist()

    def from_first(self, data: bytes, n: int, when: str, timeout: float) -> bytes:
        """Send `n` bytes from rank 0 to all ranks and return them; `data` of the other ranks is ignored."""
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
        """Run a collective of the process group, `name`, on `args`: tensors, options, `when` and timeout.

        These, unlike those of torch.distributed, take a timeout. Without one, this process would hang for half an hour
        if a rank did not come.
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
            work.wait()  # makes the stream wait, not the host
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
        """Wait for a collective for a short while; return whether it has ended."""
        try:
            work.wait(_SLICE)
            return True
        except RuntimeError:
            if not work.is_completed():
                return False
        try:
            work.wait()  # it may have ended just now
            return True
        except RuntimeError as error:
            self._failed(error, deadline, when, timeout)

    def leave(self, when: str, error: BaseException) -> None:
        """Tell the others that this rank left an exchange: it no longer knows what they agree on."""
        self._post("alarm", "")
        verdict = f"lost rank {self.rank} {when}: it left an exchange ({type(error).__name__})"
        self._lost = _lost_message(self._post("lost", verdict, first=True))

    def _failed(self, error: RuntimeError, deadline: float, when: str, timeout: float) -> NoReturn:
        late = time.monotonic() > deadline - 0.1
        self._lose(when, timeout, f"waited for {timeout:g} s" if late else f"the connection failed: {error}")

    def until(self, done: Callable[[], bool], when: str, timeout: float) -> None:
        """Wait until `done()`, as for a device, and watch for lost ranks meanwhile.

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
        """Raise RankLost if there is a reason to stop waiting: the timeout, a dead process, another rank's alarm."""
        if time.monotonic() > deadline:
            self._lose(when, timeout, f"waited for {timeout:g} s")
        if self._ended() or self._has_posted("alarm"):
            self._lose(when, timeout, "")

    def _lose(self, when: str, timeout: float, why: str) -> NoReturn:
        """Agree with the other ranks on who is lost (a process that ended, or one that does not answer), and raise."""
        self._post("alarm", why)
        self._post(f"here/{self.rank}", when)
        deadline = time.monotonic() + min(timeout, _ANSWER)
        others = silent = [r for r in range(self.size) if r != self.rank]
        while (verdict := self._read("lost")) is None:
            ended = self._ended()
            silent = [r for r in others if not self._has_posted(f"here/{r}")]
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
                verdict = self._post("lost", verdict + (f" ({why.splitlines()[0]})" if why else ""), first=True)
                break
            time.sleep(0.05)
        self._lost = _lost_message(verdict)
        self._post(f"heard/{self.rank}", "")
        # Wait for the others: a rank that ends now might be taken for the lost one, or take the store along.
        deadline = time.monotonic() + 2.0
        proven = bool(self._ended())
        while self._store is not None and time.monotonic() < deadline:
            ended = self._ended()
            if all(r in ended or (r in silent and not proven) or self._has_posted(f"heard/{r}") for r in others):
                break
            time.sleep(0.02)
        raise RankLost(self._lost)

    def _ended(self) -> list[int]:
        """The ranks on this host whose processes have ended."""
        return [
            r
            for r, (host, process, began, _) in enumerate(self._peers or [])
            if r != self.rank and host and host == self._myself[0] and _start_time(process) != began
        ]

    def texts(self, name: str, mine: str) -> list[str | None]:
        """Exchange texts; return one for each rank, None for those that did not come.

        They go through the group's store: unlike a collective, it works while ranks are at different places.

        Args:
            name: the name of this exchange, never used before.
            mine: the text of this rank.
        """
        self._post(f"{name}/{self.rank}", mine[:_TEXT])
        found: list[str | None] = [None] * self.size
        deadline = time.monotonic() + _ANSWER
        while self._store is not None:
            for r in range(self.size):
                if found[r] is None:
                    found[r] = self._read(f"{name}/{r}")
            if None not in found or time.monotonic() > deadline or self._ended():
                break
            time.sleep(0.01)
        self._post(f"{name}/read/{self.rank}", "")
        # A rank may end, and the store with it if it lives there, as soon as it has read all: wait until all have.
        deadline = time.monotonic() + 2.0
        while not all(self._has_posted(f"{name}/read/{r}") for r in range(self.size)) and time.monotonic() < deadline:
            if self._store is None or self._ended():
                break
            time.sleep(0.01)
        return found

    def _post(self, key: str, text: str, *, first: bool = False) -> str:
        """Put a text into the store; with `first`, only if there is none yet. Return what is there then."""
        if self._store is None:
            return text
        try:
            if first:
                return str(self._store.compare_set(f"{self._prefix}/{key}", "", text).decode(errors="replace"))
            self._store.set(f"{self._prefix}/{key}", text)
        except RuntimeError:
            self._store = None  # the process that kept it has ended
        return text

    def _read(self, key: str) -> str | None:
        """Read a text from the store; None if there is none."""
        if self._store is None or not self._has_posted(key):
            return None
        try:
            return str(self._store.get(f"{self._prefix}/{key}").decode(errors="replace"))
        except RuntimeError:
            self._store = None
            return None

    def _has_posted(self, key: str) -> bool:
        """Whether the store has a text."""
        if self._store is None:
            return False
        try:
            return bool(self._store.check([f"{self._prefix}/{key}"]))
        except RuntimeError:
            self._store = None
            return False


_channels: WeakKeyDictionary[Any, Channel] = WeakKeyDictionary()


def channel_of(group: Any) -> Channel:
    """The channel of a process group; None stands for the default group."""
    group = distributed.group.WORLD if group is None else group
    if group not in _channels:
        _channels[group] = Channel(group)
    return _channels[group]


def hash64(texts: Sequence[str]) -> int:
    """Hash texts to 64 bits, as a signed integer."""
    digest = hashlib.blake2s("\n".join(texts).encode(), digest_size=8).digest()
    return int(struct.unpack("<q", digest)[0])


def _lost_message(verdict: str) -> str:
    return f"ranks: {verdict}; the weights here are whole: restart all ranks and resume the trajectory"


def _store_of(group: Any) -> Any:
    """The store through which the ranks of a group met; None if PyTorch does not show it."""
    with suppress(AttributeError, KeyError, TypeError, RuntimeError, ValueError):
        return distributed.distributed_c10d._world.pg_map[group][1]  # there is no public way
    return None


def _this_process() -> list[int]:
    """Identify the process: its host (0 if /proc cannot be read), its id, and its start time."""
    process = os.getpid()
    with suppress(OSError):
        host = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
        if began := _start_time(process):
            return [hash64(host), process, began]
    return [0, process, 0]


def _start_time(process: int) -> int:
    """The start time of a process in ticks; 0 if it does not exist or has ended."""
    try:
        # The fields follow the name of the program, which may contain any characters.
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0
