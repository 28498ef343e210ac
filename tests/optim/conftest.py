"""What every test of the optimizers has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from zo_kernels.backends.types import Pass
from zo_kernels.ops import Table


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few dozen elements are not worth waking threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of the tensors that each pass was given."""
    seen: list[set[str]] = []
    apply = Table.apply

    def counting(self: Table, do: Pass) -> None:
        indices = range(len(self.names)) if do.active is None else do.active
        seen.append({self.names[i] for i in indices})
        apply(self, do)

    monkeypatch.setattr(Table, "apply", counting)
    return seen
