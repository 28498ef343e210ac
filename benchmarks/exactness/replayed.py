"""`replay`: rebuilding a run's weights from its trajectory, against training it.

Training so many steps would take hours, so the first steps of the run are real, and the others repeat their losses:
replaying a step takes the same time whatever its losses were. All of the file is replayed.
"""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels.finetune.config import Config

from ..bench.registry import Row, Wrong
from ..bench.timing import Call, Timer, median, quantile
from ..kernels.check import differing
from .demo_task import DemoTask, demo_task

VARIANTS = [
    {"dtype": "fp32", "method": "mezo", "perturb": "in_place"},
    {"dtype": "fp32", "method": "mezo", "perturb": "in_forward"},
    {"dtype": "bf16", "method": "mezo", "perturb": "in_forward"},
    {"dtype": "fp32", "method": "lezo", "perturb": "in_place"},
]
_REAL = 24  # steps before the replay, and as many after it
_PREFIX = 100  # steps replayed with one thread and with two


def measure(options: Namespace, dtype: str, method: str, perturb: str) -> list[Row]:
    steps, real = options.steps, min(_REAL, options.steps)
    config = Config(model=options.model, dtype=dtype, method=method, threads=options.threads)
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
        _check(task, file, start, reached, real, max(real, min(_PREFIX, steps)))
        task.set_weights(start)
        whole = timer.sample(Call(lambda: zo.replay(task.classifier, file), options.threads, steps=steps))
        size = file.stat().st_size
    training += train()
    ratios = [step / whole.seconds for step in training]
    return [
        {
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


def _check(task: DemoTask, file: Path, start: list[Tensor], reached: list[Tensor], real: int, more: int) -> None:
    """Replay the real steps, and more, with one thread and with two; the weights are left moved.

    Raises:
        Wrong: they are not those of the run, or not the same with both.
    """
    further: list[Tensor] | None = None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for upto, expected, whose in ((real, reached, "the run's"), (more, further, "those with one")):
            task.set_weights(start)
            zo.replay(task.classifier, file, upto)
            end = task.weights()
            if expected is not None and (off := sum(map(differing, end, expected))):
                raise Wrong(f"{off} of the weights replayed with {threads} threads have other bits than {whose}")
        further = end
    torch.set_num_threads(task.config.threads)


def cells(row: Row) -> dict[str, str]:
    return {
        "steps": f"{row['steps']:,}",
        "real": str(row["real_steps"]),
        "s": f"{row['replay_seconds']:,.1f}",
        "ms/step": f"{row['seconds_median'] * 1e3:,.2f}",
        "bytes": f"{row['file_bytes']:,}",
        "a step": f"{row['bytes_a_step']:g}",
    }
