"""A rank that dies, or comes no more, ends the others soon, with its name, and their weights are whole."""

from __future__ import annotations

import deaths
import pytest
from deaths import Death


@pytest.mark.parametrize(
    "death",
    [
        Death(1, 3, "in a closure", "killed"),
        Death(0, 2, "in an exchange", "exit", "MeZOSVRG", met="tcp"),
        Death(1, 2, "after a step", "loop", "MeZO", "directions", "in_forward"),
        Death(0, 2, "in the first closure", "segfault"),
    ],
    ids=str,
)
def test_the_others_end_with_its_name(death: Death) -> None:
    assert not deaths.die(death)


@pytest.mark.slow
def test_every_death() -> None:
    assert deaths.main(every=7) == 0
