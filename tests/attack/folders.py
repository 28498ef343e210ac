"""Files of zo-finetune's run folders, damaged: `--resume` and `replay` refuse them, or give the bits of the run."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from attack import damage, run_kills
from attack.workers import Result, expect, in_child

FILES = {
    "cut off": ("config.json", "metrics.jsonl", "start/labels.json", "start/head.safetensors", "trajectory.zo"),
    "finished": ("config.json", "model/labels.json", "start/labels.json", "start/head.safetensors", "trajectory.zo"),
    "sweep": ("sweep.json",),
}
NASTY: list[Any] = [None, True, -1, 0, 2**64, 1.5, "", "x", "../..", [], [1], {}, {"a": 1}, "a" * 10**6]
Case = tuple[str, str, int]
prepare = run_kills.prepare


def cases(count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(seed + 8)
    every = [(state, file) for state, files in FILES.items() for file in files]
    for i in range(count):
        yield *every[i % len(every)], draw.getrandbits(32)


@cache
def _folder(state: str) -> Path:
    """A run's folder, made once in a process."""
    out = Path(f"known {state}").absolute()
    run_kills.options("mezo")

    def make() -> None:
        if state == "sweep":
            from attack.disks import _do

            _do("sweep", out, "mezo")
            return
        if state == "cut off":
            from zo_kernels.finetune.runs import train

            step = train.Stepper.step

            def dying(stepper: Any, factor: float) -> Any:
                if stepper._optimizer.step_count == 6:
                    os._exit(0)
                return step(stepper, factor)

            train.Stepper.step = dying  # type: ignore[method-assign]
        run_kills.finetune(out, "mezo")

    expect(in_child(run_kills._quiet(make), 120) == 0, f"the folder {state} cannot be made")
    return out


def _damaged(draw: random.Random, path: Path) -> str:
    """By bytes, or by other values in JSON."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and draw.random() < 0.6:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        at = draw.randrange(len(lines))
        value = json.loads(lines[at])
        key = draw.choice(list(value))
        inside = value
        while isinstance(inside[key], dict) and inside[key] and draw.random() < 0.7:
            inside = inside[key]
            key = draw.choice(list(inside))
        if draw.random() < 0.2:
            del inside[key]
            what = f"without {key}"
        else:
            inside[key] = draw.choice(NASTY)
            what = f"{key} {str(inside[key])[:20]}"
        lines[at] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n")
        return what
    what, data = damage.damaged(draw, data, [len(data) // 2], b"{}" + data[::-1])
    path.write_bytes(data)
    return what


def attempt(case: Case) -> Result:
    state, file, seed = case
    draw = random.Random(seed)
    expected, _ = run_kills.undisturbed("zo-finetune", "mezo")
    for old in Path().glob("run-*"):
        shutil.rmtree(old)
    out = Path(f"run-{seed}").absolute()
    shutil.copytree(_folder(state), out)
    original = (out / file).read_bytes()
    what = _damaged(draw, out / file)
    if (out / file).read_bytes() == original:
        return Result("not damaged")
    before = _contents(out)
    words = {
        "cut off": ["--resume", str(out)],
        "finished": ["replay", str(out), "--out", f"{out}-replayed"],
        "sweep": ["sweep", "--resume", str(out)],
    }[state]

    def command() -> None:
        from zo_kernels.finetune import cli
        from zo_kernels.finetune.runs import report

        report.draw_curves = lambda records, path: None
        warnings.simplefilter("ignore")
        if status := cli.main(words):
            raise SystemExit(status)

    status = in_child(run_kills._quiet(command), 100)
    said = Path("err.txt").read_text(errors="replace")
    told = f"{state}, {file}, {what}"
    expect(status in range(256), f"{told}: ended with {status}")
    expect("Traceback" not in said, f"{told}: a traceback: {said.strip().splitlines()[-1:]}")
    if status:
        after = _contents(out)
        changed = sorted(name for name in before if before[name] != after.get(name))
        expect(not changed, f"{told}: refused, and changed {', '.join(changed)}: {said.strip()[-200:]}")
        return Result(f"{state}: refused")
    if state == "cut off" and file != "config.json":
        got = run_kills.outcome_of("zo-finetune", out)
        expect(got["weights"] == expected["weights"], f"{told}: accepted, and ends with other weights")
    elif state == "finished" and file == "trajectory.zo" and not original.startswith((out / file).read_bytes()):
        made = {p.name: p.read_bytes() for p in Path(f"{out}-replayed").rglob("*.safetensors")}
        expect(made == expected["weights"], f"{told}: accepted, and replayed to other weights")
    return Result(f"{state}: accepted")


def _contents(folder: Path) -> dict[str, bytes]:
    """But for locks, which come and go with their process."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
