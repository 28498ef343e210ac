"""A step is that of the single batch, however its rows are cut into micro-batches and shared out among processes."""

from __future__ import annotations

import functools
import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import children
import pytest
import torch
from heads import HEADS, LENGTH, ROWS, WAYS, WORDS, trainer_of
from tiny_trainer import Kept, seeded
from tolerances import loss_slope, reordered

EPS = 0.1
# Additions on the way to a loss: over words or hidden sizes within a row, then over the rows' tokens.
TERMS = 8 * WORDS + ROWS * LENGTH


class Step(NamedTuple):
    """The losses of a step, what is logged of it, and the loss of an evaluation."""

    plus: float
    minus: float
    logged: float
    gradient: float
    evaluated: float | None


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """A Trainer collects garbage at the end of a run: 0.2 s, if it looks at all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def step_of(way: str, out: Path, size: int, accumulated: int) -> Step:
    trainer = trainer_of(way, out, size, accumulated, per_device_eval_batch_size=4)
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    ((plus, minus),) = trainer.zo_optimizer.trajectory[0].losses
    evaluated = trainer.evaluate()["eval_loss"] if accumulated == 1 else None
    return Step(plus, minus, log["loss"], log["projected_gradient"], evaluated)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("single")
    return functools.cache(lambda way: step_of(way, out / way, ROWS, 1))


def assert_equal(step: Step, expected: Step) -> None:
    error = reordered(max(abs(expected.plus), abs(expected.minus)), TERMS)
    assert step.plus == pytest.approx(expected.plus, rel=0, abs=error)
    assert step.minus == pytest.approx(expected.minus, rel=0, abs=error)
    # Trainers of earlier versions round to four digits.
    assert step.logged == pytest.approx((step.plus + step.minus) / 2, rel=0, abs=5.1e-5)
    assert step.gradient == pytest.approx(expected.gradient, rel=0, abs=loss_slope(error, EPS))
    assert expected.gradient > 2 * loss_slope(error, EPS)  # or nothing would have been seen


@pytest.mark.parametrize("way", WAYS)
def test_microbatches_are_the_single_batch(way: str, single: Any, tmp_path: Path) -> None:
    """Of 10 and 6 rows, and of 5, 5, 5 and 1."""
    for accumulated, size in ((2, 10), (4, 5)) if way in HEADS else ((4, 5),):
        assert_equal(step_of(way, tmp_path / str(size), size, accumulated), single(way))


def accumulations(way: str) -> tuple[int, ...]:
    """Of each process's eight rows."""
    return (1, 2, 4) if way in HEADS else (2,)


def process_of(rank: int, port: int, out: Path) -> None:
    """One of two, for all heads."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    gc.freeze()
    steps = {}
    for way in WAYS:
        for accumulated in accumulations(way):
            size = ROWS // (2 * accumulated)
            steps[way, accumulated] = tuple(step_of(way, out / way / str(accumulated), size, accumulated))
    torch.save((steps, own_directions(out)), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def own_directions(out: Path) -> tuple[float, float]:
    """Two processes with a direction each: the loss of this one's by its trainer, and by hand."""
    kept = Kept()
    trainer = trainer_of(
        "sequence", out / "directions", 5, 2, eps=1e-4, parallel="directions", directions=2, perturb="in_forward",
        data_collator=kept,
    )  # fmt: skip
    trainer.train()
    model = seeded(HEADS["sequence"][1]).eval()
    taken = {name: torch.cat([batch[name] for batch in kept.batches[:2]]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        by_hand = model(**taken).loss.item()
    plus, minus = trainer.zo_optimizer.trajectory[0].losses[trainer.accelerator.process_index]
    return (plus + minus) / 2, by_hand


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out, context = tmp_path_factory.mktemp("two"), children.context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=process_of, args=(rank, port, out)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_processes_are_the_single_batch(way: str, two: Any, single: Any, tmp_path: Path) -> None:
    """Whose evaluation is that of one process with batches of their size."""
    for steps, _ in two:
        for accumulated in accumulations(way):
            assert_equal(Step(*steps[way, accumulated]), single(way))
        if way in HEADS:
            assert steps[way, 1][-1] == pytest.approx(single(way).evaluated, rel=1e-6)


def test_processes_with_directions_of_their_own(two: Any) -> None:
    for _, (loss, by_hand) in two:
        assert loss == pytest.approx(by_hand, rel=1e-6)
