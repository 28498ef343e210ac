"""What every test of the trainer has."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_not_searched() -> Iterator[None]:
    """Each run of a Trainer collects garbage, which takes longer than its steps while all of transformers is looked
    through.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def callers_settings() -> Iterator[None]:
    """accelerate passes some of a run's settings on in the environment, and remembers others for the process."""
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as environment:
        for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
            environment.delenv(name, raising=False)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
