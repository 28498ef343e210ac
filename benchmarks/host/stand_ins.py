"""GPU backends on a machine without a GPU: they do all that the host does for a launch, and launch nothing."""

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
    """A backend without any launch: what is left is the optimizer's own."""

    def __init__(self, launched: Launches):
        self._launched = launched

    def unavailable(self, where: object) -> None:
        return None

    def prepare(self, entries: Sequence[Entry]) -> Callable[[Pass], None]:
        return lambda do: self._launched.append(("axpy", ()))


class _Extension:
    """In place of zo_kernels._cuda."""

    def __init__(self, launched: Launches):
        self._launched = launched

    def axpy(self, *arguments: int) -> None:
        self._launched.append(("axpy", arguments))

    def record(self, *arguments: int) -> None:
        self._launched.append(("record", arguments))


@cache
def triton_driver() -> Any:
    """A driver of Triton's that compiles for an H100, which need not be here, and notes launches in its `launched`.

    There is one for the process: what is compiled keeps its driver. Kernels must not be interpreted.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
            return object(), name, 64, 0, 1024

    class Driver(DriverBase):
        launched: Launches

        def __init__(self) -> None:
            self.utils = Utils()
            self.launcher_cls = lambda src, metadata: self.launch

        def launch(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            _packed, _metadata, _enter, _exit, *arguments = rest
            self.launched.append((function, (x, y, z, *arguments)))

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError

        def get_device_interface(self) -> Any:
            raise NotImplementedError

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    return Driver()


@contextmanager
def standing_in(name: str) -> Iterator[Launches]:
    """Tables that are built within go to the stand-in of a backend ("triton", "cuda", or "nothing" for none at all),
    which takes tensors on a CPU; what it would have launched is in the list.
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

        before = triton.runtime.driver._active  # None as long as nobody has launched anything
        driver = triton_driver()
        driver.launched = launched
        triton.runtime.driver.set_active(driver)
        try:
            with mock.patch.object(backend, "unavailable", lambda where: None):
                yield launched
        finally:
            triton.runtime.driver._active = before
