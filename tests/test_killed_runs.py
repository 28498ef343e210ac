"""zo-finetune is killed at random moments, resumed, and ends with the bits of a run that was left alone."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
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

KILLS = 50
RUNS = {
    "mezo": {},
    "lezo, bf16": {"method": "lezo", "dtype": "bf16"},
    "sparse-mezo, directions": {"method": "sparse-mezo", "directions": 2, "perturb": "in_forward"},
    "mezo-svrg": {"method": "mezo-svrg", "anchor_every": 3, "anchor_examples": 16},
}


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
    processes: ForkServerContext, options: dict[str, object], *, resume: bool = False, seconds: float | None = None
) -> float:
    """Run or resume; kill it after so many seconds. Returns how long it lived."""
    process = processes.Process(target=whole_run, args=(options, resume))
    process.start()
    started = time.perf_counter()
    process.join(seconds)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    else:
        assert process.exitcode == 0
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext):
    """Each run left alone: its options, its outcome, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    common = tiny_options(tiny_encoder(folder / "tiny"), write_table(folder / "words.tsv"))
    result = {}
    for name, options in RUNS.items():
        options = {**common, "steps": 12, "eval_every": 4, **options, "out": str(folder / name)}
        run(processes, {**options, "out": str(folder / f"{name}, first")})
        seconds = run(processes, options)
        result[name] = (options, outcome(Path(options["out"])), seconds)
    return result


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
