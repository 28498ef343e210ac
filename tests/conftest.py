"""What every process of tests has."""

import gc
import os
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton's interpreter must be chosen before its kernels are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A process of tests runs on each core, and tensors are small: more threads would only wait for each other, those of the
# processes that tests start, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A process of tests takes the next file when it is nearly done with one, and the last ones leave the others idle: what
# takes longest goes first. xdist would begin with what has the most tests.
_HERE = Path(__file__).parent.as_posix()
_LONG = (
    "finetune/test_killed_runs.py", "backends/test_matrix.py", "benchmarks/test_gpu_page.py", "ranks/",
    "benchmarks/test_steps.py", "attack/", "integrations/test_heads.py", "benchmarks/test_claims.py", "test_memory.py",
    "backends/test_triton_compile.py", "backends/test_cuda_compile.py", "emulation/", "test_imports.py", "runs/",
    "perturbation/", "benchmarks/", "finetune/",
)  # fmt: skip

# A shell that starts a command in the background has it ignore Ctrl-C; tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.path.as_posix().removeprefix(f"{_HERE}/")
        return next((i for i, long in enumerate(_LONG) if file.startswith(long)), len(_LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs and benchmarks set the number for the whole process, in what a module's tests share, too."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """What tests collect garbage of is their own: what others have imported, millions of objects, is not looked through
    each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def remembered_noise() -> Iterator[None]:
    """The specification's numbers for the same indices are computed once: they are most of the time of a matrix."""
    from zo_kernels import spec

    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal", "rademacher", "rounding_bits"):
            patch.setattr(spec, name, _remembered(getattr(spec, name)))
        yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of the tensors that each pass was given."""
    from zo_kernels.ops import Table

    seen: list[set[str]] = []
    apply = Table.apply

    def counting(self: Table, do: Any, *then: Any) -> None:
        indices = range(len(self.names)) if do.active is None else do.active
        seen.append({self.names[i] for i in indices})
        apply(self, do, *then)

    monkeypatch.setattr(Table, "apply", counting)
    return seen


def _remembered(compute):
    @lru_cache(maxsize=512)
    def of_range(start: int, count: int, *numbers: int | str) -> torch.Tensor:
        return compute(torch.arange(count, device="cpu") + start, *numbers)

    def of(index: torch.Tensor, *numbers: int | str) -> torch.Tensor:
        count, start = index.numel(), int(index[0]) if index.numel() else 0
        range_of = torch.arange(count, device=index.device) + start
        if count <= 2**14 and index.device.type == "cpu" and torch.equal(index, range_of):
            return of_range(start, count, *numbers).clone()
        return compute(index, *numbers)

    return of
