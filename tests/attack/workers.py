"""Processes that try cases: one that crashes, hangs or takes too much memory is a finding, and the next goes on."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import children
import torch

MEMORY = 2**30  # that a case may take beyond what its process had before the first one


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        outcome: in a word or two; they are counted.
        finding: what is wrong, None if nothing is.
        tally: numbers to be added up.
    """

    outcome: str
    finding: str | None = None
    tally: dict[str, int] = field(default_factory=dict)


class Wrong(AssertionError):
    """What an oracle says."""


def expect(fine: bool, told: str) -> None:
    """What must hold."""
    if not fine:
        raise Wrong(told)


@dataclass
class Worker:
    """A process, and the case that it has."""

    process: Any
    pipe: Connection
    case: Any = None
    began: float = 0.0
    ready: bool = False


@dataclass
class Pool:
    """Tries the cases of one attack.

    Args:
        function: "module:name" of what tries one, given the case; it returns an outcome, or a `Result`.
        timeout: seconds a case.
        processes: how many.
        limited: whether its address space is limited, too; else the largest resident size is looked at afterwards.
        startup: seconds that a process may take to import and to prepare.
    """

    function: str
    timeout: float = 10.0
    processes: int = 2
    limited: bool = False
    startup: float = 120.0
    grown: int = field(default=0, init=False)  # bytes, the most of any process

    def results(self, cases: Iterable[Any]) -> Iterator[tuple[Any, Result]]:
        """Of each case, in the order in which they are done."""
        waiting = iter(cases)
        workers = [self._start() for _ in range(self.processes)]
        try:
            while workers:
                wait([w.pipe for w in workers] + [w.process.sentinel for w in workers], timeout=0.2)
                for i, w in reversed(list(enumerate(workers))):
                    answer = self._answer(w)
                    if answer is None:
                        continue
                    if isinstance(answer, Result):
                        had = w.case
                        if w.process.exitcode is not None or answer.outcome in ("hung", "crashed"):
                            workers[i] = w = self._start()
                        w.case = None
                        yield had, answer
                    if not w.ready:
                        continue
                    try:
                        w.case = next(waiting)
                    except StopIteration:
                        self._stop(workers.pop(i))
                        continue
                    w.began = time.monotonic()
                    w.pipe.send(w.case)
        finally:
            for w in workers:
                self._stop(w)

    def _answer(self, w: Worker) -> Any:
        """A result, True for a process that can begin, None if there is nothing yet."""
        try:
            if w.pipe.poll():
                answer, grown = w.pipe.recv()
                self.grown = max(self.grown, grown)
                w.ready = True
                return answer
        except (EOFError, ConnectionResetError, OSError):
            pass
        else:
            limit = self.timeout if w.ready else self.startup
            if time.monotonic() - w.began < limit and w.process.exitcode is None:
                return None
            if w.process.exitcode is None:
                w.process.kill()
                w.process.join()
                if not w.ready:
                    raise RuntimeError(f"{self.function}: a process did not begin within {self.startup} s")
                return Result("hung", f"no end after {self.timeout} s")
        w.process.join(10)
        if not w.ready:
            raise RuntimeError(f"{self.function}: a process could not begin, exit {w.process.exitcode}")
        return Result("crashed", f"the process died: exit {w.process.exitcode}")

    def _start(self) -> Worker:
        context = children.context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.function, self.limited), daemon=False)
        process.start()
        theirs.close()
        return Worker(process, ours, began=time.monotonic())

    @staticmethod
    def _stop(w: Worker) -> None:
        w.pipe.close()
        w.process.join(2)
        if w.process.exitcode is None:
            w.process.kill()
            w.process.join()


def _work(pipe: Connection, function: str, limited: bool) -> None:
    """In a process of its own: tries what comes through the pipe until that is closed."""
    torch.set_num_threads(1)  # also since forks of a process with more would wait for threads that they lack
    attempt = named(function)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        os.chdir(folder)
        prepare = getattr(importlib.import_module(function.partition(":")[0]), "prepare", None)
        if prepare is not None:
            prepare()
        faulthandler.disable()
        gc.collect()
        gc.freeze()  # what was imported is not looked through each time
        limits = resource.getrlimit(resource.RLIMIT_AS)
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, limits[1]))
        before = _largest()
        pipe.send((True, 0))
        while True:
            try:
                case = pipe.recv()
            except (EOFError, OSError):
                return
            result = tried(attempt, case)
            grown = max(0, _largest() - before)
            if grown > MEMORY and result.finding is None:
                result = Result("grown", f"{grown / 2**20:.0f} MiB were taken")
            pipe.send((result, grown))


def named(function: str) -> Callable[[Any], Any]:
    """What "module:name" stands for."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def tried(attempt: Callable[[Any], Any], case: Any) -> Result:
    """What comes of a case; whatever it raises is a finding."""
    try:
        result = attempt(case)
    except Wrong as wrong:
        return Result("wrong", str(wrong))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Result("raised", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:1000])
    return result if isinstance(result, Result) else Result(str(result))


def _largest() -> int:
    """Resident bytes, the most so far, of this process and of those that it waited for."""
    each = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(each) * 1024


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def in_child(work: Callable[[], None], timeout: float = 60.0) -> int:
    """Do it in a fork of this process; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return waited(pid, timeout)


def waited(pid: int, timeout: float = 60.0) -> int:
    """For the end of a fork; -1000 if it had to be ended."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1000
