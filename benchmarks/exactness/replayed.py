"""`replay`: rebuilding a run's weights from its trajectory, against training it.

Training so many steps would take hours, so the first steps of the run are real, and the others repeat their losses:
replaying a step takes the same time whatever its losses were. All of the file is replayed.
"""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels.finetune.config import Config

from ..bench.registry import Case, Row
from ..bench.timing import Call, Timer, median, quantile
from ..kernels.reference_pass import differing
from ..step.exact import wrong_step
from .demo_task import DemoTask, demo_task, set_weights, weights_of

_REAL = 24  # steps before the replay, and as many after it
_PREFIX = 100  # steps replayed with one thread and with two
_VARIANTS = (
    ("fp32", "mezo", "in_place"),
    ("fp32", "mezo", "in_forward"),
    ("bf16", "mezo", "in_forward"),
    ("fp32", "lezo", "in_place"),
)


def cases(options: Namespace) -> Iterator[Case]:
    for dtype, method, perturb in _VARIANTS:
        facts = {
            "experiment": "replay",
            "device": "cpu",
            "dtype": dtype,
            "method": method,
            "perturb": perturb,
            "rounding": "stochastic",
            "threads": options.threads,
        }
        measure = partial(_measure, options, dtype, method, perturb)
        yield Case("/".join(("replay", dtype, method, perturb)), facts, measure)


def _measure(options: Namespace, dtype: str, method: str, perturb: str) -> list[Row]:
    real = min(_REAL, options.steps)
    config = Config(model=options.model, dtype=dtype, method=method, threads=options.threads)
    task = demo_task(config)
    start = weights_of(task.classifier)
    batches = task.batches()
    first = next(batches)
    if method == "mezo":
        wrong = wrong_step(task.optimizer(perturb, "stochastic"), task.classifier, lambda: task.loss(first))
        if wrong:
            return [{"correct": False, "wrong": wrong}]
        set_weights(task.classifier, start)
    optimizer = task.optimizer(perturb, "stochastic")
    timer = Timer(torch.device("cpu"))
    rate = [float(config.lr or 0.0)]

    def train() -> list[float]:
        steps = (partial(task.train, optimizer, [batch], rate) for batch in islice(batches, real))
        return [timer.sample(Call(step, options.threads)).seconds for step in steps]

    training = train()
    reached = weights_of(task.classifier)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trajectory.zo")
        trajectory = _prolonged(optimizer.trajectory, options.steps)
        trajectory.save(file)
        if wrong := _wrong(task, file, start, reached, real, min(_PREFIX, options.steps)):
            return [{"correct": False, "wrong": wrong}]
        set_weights(task.classifier, start)
        whole = timer.sample(Call(lambda: zo.replay(task.classifier, file), options.threads, steps=options.steps))
        training += train()
        size = file.stat().st_size
    ratios = [step / whole.seconds for step in training]
    return [
        {
            "correct": True,
            "elements": sum(w.numel() for w in start),
            "samples": 1,
            "steps": options.steps,
            "real_steps": real,
            "repeated_steps": options.steps - real,
            "replay_seconds": whole.seconds * options.steps,
            "seconds_median": whole.seconds,
            "cpu_seconds_median": whole.cpu_seconds,
            "file_bytes": size,
            "bytes_a_step": (size - _setup_bytes(trajectory)) / options.steps,
            "baseline": "training",
            "baseline_seconds_median": median(training),
            "ratio_of": "whole",
            "ratio": median(ratios),
            "ratio_p10": quantile(ratios, 0.1),
            "ratio_p90": quantile(ratios, 0.9),
        }
    ]


def _prolonged(trajectory: zo.Trajectory, steps: int) -> zo.Trajectory:
    """A copy that repeats its steps until it has so many."""
    result = copy.deepcopy(trajectory)
    for record in islice(cycle(trajectory), steps - len(trajectory)):
        result.add(record)
    return result


def _setup_bytes(trajectory: zo.Trajectory) -> int:
    """What the file holds before its first step."""
    bare = zo.Trajectory()
    for _, setup in trajectory.setups:
        bare.add_setup(setup)
    return len(bare.to_bytes())


def _wrong(task: DemoTask, file: Path, start: list[Tensor], reached: list[Tensor], real: int, more: int) -> str | None:
    """Are the replayed weights those of the run, and the same with one thread and with two? They are left moved."""
    ends = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for upto in (real, max(real, more)):
            set_weights(task.classifier, start)
            zo.replay(task.classifier, file, upto)
            ends.append(weights_of(task.classifier))
    torch.set_num_threads(task.config.threads)
    for threads, end in ((1, ends[0]), (2, ends[2])):
        if off := _differing(end, reached):
            return f"{off} of the weights replayed with {threads} threads have other bits than the run's"
    off = _differing(ends[1], ends[3])
    return f"{off} of the replayed weights have other bits with two threads than with one" if off else None


def _differing(got: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    return sum(differing(a, b) for a, b in zip(got, expected, strict=True))


def cells(row: Row) -> dict[str, str]:
    return {
        "steps": f"{row['steps']:,}",
        "real": str(row["real_steps"]),
        "s": f"{row['replay_seconds']:,.1f}",
        "ms/step": f"{row['seconds_median'] * 1e3:,.2f}",
        "bytes": f"{row['file_bytes']:,}",
        "a step": f"{row['bytes_a_step']:g}",
    }
