"""What every test of the optimizers has."""

from __future__ import annotations

import pytest

from zo_kernels.backends.types import Pass
from zo_kernels.ops import Table


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
