"""zo-finetune is killed at each of its file operations and at random moments, resumed, and ends with the bits of a run
that was left alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
from multiprocessing.context import ForkServerContext
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import pytest

pytest.importorskip("transformers")
for module in ("rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

import children  # noqa: E402
from tiny_run import tiny_encoder, tiny_options, whole_run, write_table  # noqa: E402

import zo_kernels as zo  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL"),
    pytest.mark.usefixtures("without_curves"),
]

KILLS = 8  # `make attack` has hundreds
RUNS = {
    "mezo": {},
    "lezo, bf16": {"method": "lezo", "dtype": "bf16"},
    "sparse-mezo, directions of signs": {
        "method": "sparse-mezo", "directions": 2, "distribution": "rademacher", "perturb": "in_forward"
    },
    "mezo-svrg": {"method": "mezo-svrg", "anchor_every": 3, "anchor_examples": 16},
}  # fmt: skip


class Counted(NamedTuple):
    """What a run is killed at: so many calls into this package, or operations on files of its folder. 0: not killed."""

    what: Literal["call", "operation"]
    number: int


def _killed_run(options: dict[str, object], resume: bool, kill: Counted, counts: Synchronized[int]) -> None:
    """In a process of its own. `counts` becomes how many there were, if it was not killed."""
    out, package = str(options["out"]), os.path.dirname(zo.__file__)
    what, number = kill
    counted = 0

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        if package in frame.f_code.co_filename:
            counted += 1
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event not in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}:
            return
        path, flags = arguments[0], arguments[2] if event == "open" else os.O_WRONLY
        if not str(path).startswith(out) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        counted += 1
        if counted == number:
            if flags & os.O_TRUNC:
                os.close(os.open(path, flags))  # it dies when the file is open, and empty
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "operation":
        sys.addaudithook(audit)
    if what == "call":
        sys.settrace(trace)
    whole_run(options, resume)
    sys.settrace(None)
    counts.value = counted


def finished(out: Path) -> bool:
    return (out / "model" / "labels.json").exists()


def outcome(out: Path) -> dict[str, object]:
    """All that must not depend on whether the run was interrupted."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = sorted((out / "model").glob("*.safetensors"))
    return {
        "weights": {path.name: path.read_bytes() for path in weights},
        "losses": [(r["step"], pytest.approx(r["loss"], rel=1e-6), r["lr"]) for r in lines if r["event"] == "step"],
        "evaluations": [(r["step"], r["split"], r["loss"]) for r in lines if r["event"] == "evaluation"],
        "steps": [(r.kind, r.losses, r.rates) for r in zo.Trajectory.load(out / "trajectory.zo")],
    }


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that have imported everything already."""
    return children.context()


def run(processes: ForkServerContext, options: dict[str, object], kill: Counted | None, *, resume: bool = False) -> int:
    """Run or resume. Returns what was counted, -1 if it was killed."""
    if kill is None:  # in this process, which is another than what was killed, and has run before
        whole_run(options, resume)
        return 0
    counts = processes.Value("q", 0)
    process = processes.Process(target=_killed_run, args=(options, resume, kill, counts))
    process.start()
    process.join()
    if kill.number and process.exitcode == -signal.SIGKILL:
        return -1
    assert process.exitcode == 0
    return counts.value


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext):
    """Each run left alone: its options, its outcome, and how many calls it makes."""
    folder = tmp_path_factory.mktemp("whole")
    common = tiny_options(tiny_encoder(folder / "tiny"), write_table(folder / "words.tsv"))
    result = {}
    for name, options in RUNS.items():
        options = {**common, "steps": 8, "eval_every": 4, **options, "out": str(folder / name)}
        calls = run(processes, options, Counted("call", 0))
        result[name] = (options, outcome(Path(options["out"])), calls)
    return result


def test_killed_at_each_file_operation_and_resumed(whole_runs, processes: ForkServerContext, tmp_path: Path) -> None:
    options, expected, _ = whole_runs["mezo"]
    for number in itertools.count(1):
        out = tmp_path / str(number)
        options = {**options, "out": str(out)}
        if run(processes, options, Counted("operation", number)) >= 0:
            break
        if not finished(out):
            run(processes, options, None, resume=(out / "config.json").exists())
        assert outcome(out) == expected, number
    assert number > 20, number  # else they were not counted


def test_killed_at_any_moment_and_resumed(whole_runs, processes: ForkServerContext, tmp_path: Path) -> None:
    draw = random.Random(0)
    moments = set()
    for i in range(KILLS):
        name = list(RUNS)[i % len(RUNS)]
        options, expected, calls = whole_runs[name]
        out = tmp_path / str(i)
        options = {**options, "out": str(out)}
        run(processes, options, Counted("call", draw.randint(1, calls)))
        while not finished(out):
            begun = (out / "config.json").exists()
            moments.add(zo.Trajectory.load(out / "trajectory.zo", recover=True).steps if begun_steps(out) else -1)
            # Every other time it is killed again.
            again = Counted("call", draw.randint(1, calls)) if draw.random() < 0.5 else None
            run(processes, options, again, resume=begun)
        got = outcome(out)
        for what in expected:
            assert got[what] == expected[what], f"{what} of run {i}, {name}"
    assert len(moments) > 4, moments  # else the kills were not spread over the run


def begun_steps(out: Path) -> bool:
    with contextlib.suppress(OSError):
        return (out / "trajectory.zo").stat().st_size > 0
    return False
