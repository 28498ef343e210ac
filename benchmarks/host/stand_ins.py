"""Stand-ins for the GPU backends on a machine without a GPU: the host does all of its work, and nothing is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

from zo_kernels import backends
from zo_kernels.backends.types import Entry, Pass

Launches = list[tuple[str, tuple[Any, ...]]]  # (kernel, its grid and arguments)


class Nothing:
    """A backend that does nothing: what remains is the optimizer's own time."""

    def __init__(self, launched: Launches):
        self._launched = launched

    def unavailable(self, where: object) -> None:
        return None

    def prepare(self, entries: Sequence[Entry]) -> Callable[[Pass], None]:
        return lambda do: self._launched.append(("axpy", ()))


class _Extension:
    """Takes the place of zo_kernels._cuda."""

    def __init__(self, launched: Launches):
        self._launched = launched

    def axpy(self, *arguments: int) -> None:
        self._launched.append(("axpy", arguments))

    def record(self, *arguments: int) -> None:
        self._launched.append(("record", arguments))


@cache
def triton_driver() -> Any:
    """A Triton driver that compiles for an H100 and notes launches in its `launched`; the kernels never run.

    A process has one, because compiled kernels keep their driver. It does not work with Triton's interpreter.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
            return object(), name, 64, 0, 1024

    def begin(self: Any) -> None:
        self.utils = Utils()
        self.launcher_cls = lambda src, metadata: self.launch

    def launch(self: Any, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        _packed, _metadata, _enter, _exit, *arguments = rest
        self.launched.append((function, (x, y, z, *arguments)))

    own = {
        "__init__": begin,
        "launch": launch,
        "is_active": classmethod(lambda cls: True),
        "get_current_device": lambda self: 0,
        "set_current_device": lambda self, device: None,
        "get_current_stream": lambda self, device: 0,
        "get_current_target": lambda self: GPUTarget("cuda", 90, 32),
    }
    # What nobody calls here is None, which no longer is abstract.
    return type("Driver", (DriverBase,), dict.fromkeys(DriverBase.__abstractmethods__) | own)()


@contextmanager
def standing_in(name: str) -> Iterator[Launches]:
    """Give tables built in the block to the stand-in of "triton" or "cuda", or to "nothing", which has no launches.

    It takes tensors on a CPU. Yields the list of what it would have launched.
    """
    launched: Launches = []
    if name == "nothing":
        with mock.patch.object(backends, "resolve", lambda name, where: Nothing(launched)):
            yield launched
    elif name == "cuda":
        from zo_kernels.backends import cuda

        with (
            mock.patch.object(cuda, "_cuda", _Extension(launched)),
            mock.patch.object(cuda, "unavailable", lambda where: None),
        ):
            yield launched
    else:
        import triton

        from zo_kernels.backends import triton as backend

        before = triton.runtime.driver._active  # None before the first launch
        driver = triton_driver()
        driver.launched = launched
        triton.runtime.driver.set_active(driver)
        try:
            with mock.patch.object(backend, "unavailable", lambda where: None):
                yield launched
        finally:
            triton.runtime.driver._active = before
