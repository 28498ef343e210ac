"""Whatever ranks differ in is told by all of them, with both values, before a weight is changed; and none waits."""

from __future__ import annotations

import time

import disagreements
import pytest
from pool import Pool


def attack(ranks: Pool, when: str, name: str, size: int, odd: int, limit: float = 8.0) -> list[str]:
    """One disagreement; what is wrong about how it ends."""
    case = {"start": disagreements.START, "later": disagreements.LATER}[when][name]
    begin = time.monotonic()
    ends = ranks.run(size, disagreements.disagree, when=when, name=name, odd=odd)
    wrong = [f"took {took:.1f} s"] if (took := time.monotonic() - begin) > limit else []
    others = {(0, 2): "rank 1", (1, 2): "rank 0", (0, 3): "ranks 1-2", (1, 3): "ranks 0 and 2", (2, 3): "ranks 0-1"}
    parts = {others[odd, size]: "{others}", f"rank {odd}": "{odd}"}
    wanted = case.said.format(others=others[odd, size], odd=f"rank {odd}")
    turned = wanted  # values are told in the order of the ranks
    if odd == 0 and ", " in wanted and len(parts) == 2:
        name_of, _, values = wanted.rpartition(": ")
        first, _, second = values.rpartition(f" on {others[odd, size]}, ")
        turned = (f"{name_of}: " if name_of else "") + f"{second}, {first} on {others[odd, size]}"
    for rank, end in enumerate(ends):
        if case.error == "RanksDiffer" and end["said"] != ends[0]["said"]:
            wrong.append(f"rank {rank} says {end['said']!r}, the first {ends[0]['said']!r}")
        if (rank != odd or case.error == "RanksDiffer") and not (
            end["said"].startswith(f"{case.error}: ") and (wanted in end["said"] or turned in end["said"])
        ):
            wrong.append(f"rank {rank} says {end['said']!r}, expected {wanted!r}")
        if not end["said"] or end["steps"] or not end["whole"]:
            wrong.append(f"rank {rank}: {end}")
        if end["failed"] != (0 if when == "start" else disagreements.ODD_STEP):
            wrong.append(f"rank {rank}: noticed in step {end['failed'] + 1}")
    return wrong


@pytest.mark.parametrize("name", disagreements.START)
def test_from_the_start(ranks: Pool, name: str) -> None:
    assert not attack(ranks, "start", name, 2, 1)


@pytest.mark.parametrize("name", disagreements.LATER)
def test_from_some_step_on(ranks: Pool, name: str) -> None:
    assert not attack(ranks, "later", name, 3, 1)


@pytest.mark.parametrize("step", [0, 2])
def test_a_rank_that_writes_to_weights_stops_all(ranks: Pool, step: int) -> None:
    """It is no loss that was not finite, which ZOTrainer passes over."""
    (other, counted), (own, counted_there) = ranks.run(2, disagreements.writes, step=step)
    assert other.startswith("ValueError: closure: its loss was rejected on rank 1, which says why; ")
    assert own.startswith("ValueError: closure: it wr") and "head.weight" in own
    assert counted == counted_there == step + 1


def test_messages_at_random_change_nothing(ranks: Pool) -> None:
    first, second, _ = ranks.run(3, disagreements.crafted, messages=24)
    assert len(first) == 24 and first == second
    assert {said.partition(":")[0] for said in first} <= {"RanksDiffer", "RankRaised", "OutOfRange"}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "odd"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("when", ["start", "later"])
def test_all(ranks: Pool, when: str, size: int, odd: int) -> None:
    cases = {"start": disagreements.START, "later": disagreements.LATER}[when]
    assert not {name: wrong for name in cases if (wrong := attack(ranks, when, name, size, odd))}
