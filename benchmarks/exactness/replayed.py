"""`replay`: rebuilding a run's weights from its trajectory, against training it.

Training so many steps would take hours, so the first steps of the run are real, and the others repeat their losses:
replaying a step takes the same time whatever its losses were. All of the file is replayed. A run along random signs is
compared with one along normals, too, both replayed as far as `_PAIRED` steps in alternating pairs.
"""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels.finetune.config import Config

from ..bench.compare import Trial, Versus, compare
from ..bench.registry import Row, Target, Wrong
from ..bench.timing import Call, Plan, Timer, median, quantile
from ..kernels.check import differing
from .demo_task import DemoTask, demo_task

VARIANTS = [
    {"dtype": "fp32", "method": "mezo", "perturb": "in_place"},
    {"dtype": "fp32", "method": "mezo", "perturb": "in_forward"},
    {"dtype": "bf16", "method": "mezo", "perturb": "in_forward"},
    {"dtype": "fp32", "method": "lezo", "perturb": "in_place"},
    {"dtype": "fp32", "method": "mezo", "perturb": "in_place", "distribution": "rademacher"},
    {"dtype": "fp32", "method": "mezo", "perturb": "in_forward", "distribution": "rademacher"},
    {"dtype": "bf16", "method": "mezo", "perturb": "in_forward", "distribution": "rademacher"},
]
_REAL = 24  # steps before the replay, and as many after it
_PREFIX = 100  # steps replayed with one thread and with two
_PAIRED = 500
_LEAST_PAIRS = 3
_SIGNS_AGAINST_NORMALS = {"fp32": 8.0}


def measure(options: Namespace, dtype: str, method: str, perturb: str, distribution: str = "normal") -> list[Row]:
    steps, real = options.steps, min(_REAL, options.steps)
    known = {"model": options.model, "dtype": dtype, "method": method, "threads": options.threads}
    config = Config(**known, distribution=distribution)
    task = demo_task(config)
    start, batches = task.weights(), task.batches()
    next(batches)  # the check used it
    optimizer = task.optimizer(perturb, "stochastic")
    timer = Timer(torch.device("cpu"))
    rate = [float(config.lr or 0.0)]

    def train() -> list[float]:
        calls = (partial(task.train, optimizer, [batch], rate) for batch in islice(batches, real))
        return [timer.sample(Call(call, options.threads)).seconds for call in calls]

    training, reached = train(), task.weights()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trajectory.zo")
        trajectory = _prolonged(optimizer.trajectory, steps)
        trajectory.save(file)
        check = partial(_wrong, task, file, start, reached, real, max(real, min(_PREFIX, steps)))
        if wrong := check():
            raise Wrong(wrong)
        task.set_weights(start)
        whole = timer.sample(Call(lambda: zo.replay(task.classifier, file), options.threads, steps=steps))
        size = file.stat().st_size
        paired: list[Row] = []
        if distribution != "normal":
            other = _normals(demo_task(Config(**known)), perturb, Path(folder, "normals.zo"), min(_PAIRED, steps))
            own = partial(_replayed, task, file, start, min(_PAIRED, steps))
            paired = _against_normals(own, other, check, options, dtype, min(_PAIRED, steps))
    training += train()
    ratios = [step / whole.seconds for step in training]
    row: Row = {
        "rounding": "stochastic",
        "elements": sum(w.numel() for w in start),
        "samples": 1,
        "steps": steps,
        "real_steps": real,
        "repeated_steps": steps - real,
        "replay_seconds": whole.seconds * steps,
        "seconds_median": whole.seconds,
        "cpu_seconds_median": whole.cpu_seconds,
        "file_bytes": size,
        "bytes_a_step": (size - _setup_bytes(trajectory)) / steps,
        "baseline": "training",
        "baseline_seconds_median": median(training),
        "ratio_of": "whole",
        "ratio": median(ratios),
        "ratio_p10": quantile(ratios, 0.1),
        "ratio_p90": quantile(ratios, 0.9),
    }
    return [row, *({**row, **of_pairs} for of_pairs in paired)]


def _replayed(task: DemoTask, file: Path, start: list[Tensor], steps: int) -> None:
    task.set_weights(start)
    zo.replay(task.classifier, file, steps)


def _normals(task: DemoTask, perturb: str, file: Path, steps: int) -> Callable[[], None]:
    """What replays so many steps of the same run along normals."""
    start, optimizer = task.weights(), task.optimizer(perturb, "stochastic")
    task.train(optimizer, islice(task.batches(), 1), [float(task.config.lr or 0.0)])
    _prolonged(optimizer.trajectory, steps).save(file)
    return partial(_replayed, task, file, start, steps)


def _against_normals(
    own: Callable[[], None],
    other: Callable[[], None],
    check: Callable[[], str | None],
    options: Namespace,
    dtype: str,
    steps: int,
) -> list[Row]:
    """The row of pairs of replays of so many steps; there are at least `_LEAST_PAIRS`."""
    calls = [Call(call, options.threads, steps=steps) for call in (own, other)]
    stated = dtype in _SIGNS_AGAINST_NORMALS and steps == _PAIRED
    targets = [Target("ratio", _SIGNS_AGAINST_NORMALS[dtype])] if stated else []
    trial = Trial(calls[0], check, [Versus("normals", calls[1], targets=targets)], elements=0)
    rows = compare(trial, Plan(_LEAST_PAIRS, 0.0), torch.device("cpu"))
    timed = ("samples", "seconds_median", "cpu_seconds_median", "target", "target_met", "target_missed", "cpu_ratio")
    return [{k: v for k, v in row.items() if k in timed or k.startswith(("ratio", "baseline"))} for row in rows]


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
    """Replay the real steps, and more, with one thread and with two; the weights are left moved.

    Returns:
        Why they are not those of the run, or not the same with both; or None.
    """
    further: list[Tensor] | None = None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for upto, expected, whose in ((real, reached, "the run's"), (more, further, "those with one")):
            _replayed(task, file, start, upto)
            end = task.weights()
            if expected is not None and (off := sum(map(differing, end, expected))):
                return f"{off} of the weights replayed with {threads} threads have other bits than {whose}"
        further = end
    torch.set_num_threads(task.config.threads)
    return None


def cells(row: Row) -> dict[str, str]:
    return {
        "steps": f"{row['steps']:,}",
        "real": str(row["real_steps"]),
        "s": f"{row['replay_seconds']:,.1f}",
        "ms/step": f"{row['seconds_median'] * 1e3:,.2f}",
        "bytes": f"{row['file_bytes']:,}",
        "a step": f"{row['bytes_a_step']:g}",
    }
