"""What every test of the trainer has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

_MISSING = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _MISSING else []


def pytest_report_header() -> str | None:
    return f"tests/integrations: left out, without {' and '.join(_MISSING)}" if _MISSING else None


@pytest.fixture(autouse=True)
def callers_settings() -> Iterator[None]:
    """accelerate passes some of a run's settings on in the environment, and remembers others for the process."""
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as environment:
        for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
            environment.delenv(name, raising=False)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
