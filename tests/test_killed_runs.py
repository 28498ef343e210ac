"""zo-finetune is killed at each of its file operations and at random moments, resumed, and ends with the bits of a run
that was left alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

pytest.importorskip("transformers")
for module in ("rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from tiny_run import tiny_encoder, tiny_options, whole_run, write_table  # noqa: E402

import zo_kernels as zo  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")

KILLS = 20
RUNS = {
    "mezo": {},
    "lezo, bf16": {"method": "lezo", "dtype": "bf16"},
    "sparse-mezo, directions": {"method": "sparse-mezo", "directions": 2, "perturb": "in_forward"},
    "mezo-svrg": {"method": "mezo-svrg", "anchor_every": 3, "anchor_examples": 16},
}


def _killed_run(options: dict[str, object], resume: bool, operations: int | None) -> None:
    left = operations or 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in {"open", "os.rename", "os.remove", "os.mkdir"}:
            return
        path = arguments[0]
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(str(options["out"])):
            return
        flags = arguments[2] if event == "open" else os.O_WRONLY
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return
        left -= 1
        if left == 0:
            if flags & os.O_TRUNC:
                os.close(os.open(path, flags))  # it dies when the file is open, and empty
            os.kill(os.getpid(), signal.SIGKILL)

    if operations is not None:
        sys.addaudithook(count)
    whole_run(options, resume)


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
    context = multiprocessing.get_context("forkserver")
    # pytest, too: a child imports the module that its parent was started with.
    context.set_forkserver_preload(["zo_kernels.finetune.train", "transformers.models.bert.modeling_bert", "pytest"])
    return context


def run(
    processes: ForkServerContext,
    options: dict[str, object],
    *,
    resume: bool = False,
    seconds: float | None = None,
    operations: int | None = None,
) -> bool:
    """Run or resume; kill it after so many seconds, or as many file operations. Returns whether it was killed."""
    process = processes.Process(target=_killed_run, args=(options, resume, operations))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in ({0} if seconds is operations is None else {0, -signal.SIGKILL})
    return process.exitcode != 0


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext):
    """Each run left alone: its options, its outcome, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    common = tiny_options(tiny_encoder(folder / "tiny"), write_table(folder / "words.tsv"))
    result = {}
    for name, options in RUNS.items():
        options = {**common, "steps": 12, "eval_every": 4, **options, "out": str(folder / name)}
        run(processes, {**options, "out": str(folder / f"{name}, first")})
        started = time.perf_counter()
        run(processes, options)
        result[name] = (options, outcome(Path(options["out"])), time.perf_counter() - started)
    return result


def test_killed_at_each_file_operation_and_resumed(whole_runs, processes: ForkServerContext, tmp_path: Path) -> None:
    options, expected, _ = whole_runs["mezo"]
    for count in itertools.count(1):
        out = tmp_path / str(count)
        if not run(processes, {**options, "out": str(out)}, operations=count):
            break
        if not finished(out):
            run(processes, {**options, "out": str(out)}, resume=(out / "config.json").exists())
        assert outcome(out) == expected, count
    assert count > 20, count  # else they were not counted


def test_killed_at_any_moment_and_resumed(whole_runs, processes: ForkServerContext, tmp_path: Path) -> None:
    draw = random.Random(0)
    moments = set()
    for i in range(KILLS):
        name = list(RUNS)[i % len(RUNS)]
        options, expected, seconds = whole_runs[name]
        out = tmp_path / str(i)
        options = {**options, "out": str(out)}
        run(processes, options, seconds=draw.uniform(0, seconds))
        while not finished(out):
            begun = (out / "config.json").exists()
            moments.add(zo.Trajectory.load(out / "trajectory.zo", recover=True).steps if begun_steps(out) else -1)
            # Every other time it is killed again.
            again = draw.uniform(0, seconds) if draw.random() < 0.5 else None
            run(processes, options, resume=begun, seconds=again)
        got = outcome(out)
        for what in expected:
            assert got[what] == expected[what], f"{what} of run {i}, {name}"
    assert len(moments) > 4, moments  # else the kills were not spread over the run


def begun_steps(out: Path) -> bool:
    with contextlib.suppress(OSError):
        return (out / "trajectory.zo").stat().st_size > 0
    return False
