"""zo-finetune and ZOTrainer, killed and resumed until they are done."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

import zo_kernels as zo
from attack.kills import kill_after, kill_at_call, kill_at_operation
from attack.workers import Result, expect, in_child

Case = tuple[str, str, str, int]  # what, which run, how it is killed, seed
WAYS = ("call", "operation", "clock")
TRAINED = {"mezo": {}, "mezo-svrg": {"method": "mezo-svrg", "anchor_every": 2, "anchor_lr": 1e-3}}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def prepare() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` is of runs; each is killed several times."""
    draw = random.Random(seed + 3)
    finetuned = ["mezo", "lezo, bf16", "sparse-mezo, directions", "mezo-svrg"]
    for i in range(count):
        what = "trainer" if i % 3 == 2 else "zo-finetune"
        names = list(TRAINED) if what == "trainer" else finetuned
        yield what, names[i % len(names)], WAYS[i // 3 % 3], draw.getrandbits(32)


@cache
def options(name: str) -> dict[str, Any]:
    """Of a run of zo-finetune, but for its folder."""
    from test_killed_runs import RUNS
    from tiny_run import tiny_encoder, tiny_options, write_table

    home = Path("tiny").absolute()
    if not home.exists():
        home.mkdir()

        def make() -> None:
            tiny_encoder(home / "model")
            write_table(home / "words.tsv")

        expect(in_child(_quiet(make)) == 0, "the tiny model cannot be made")
    return {**tiny_options(home / "model", home / "words.tsv"), "steps": 12, "eval_every": 4, **RUNS[name]}


def finetune(out: Path, name: str) -> None:
    """What somebody does who starts it again."""
    from tiny_run import whole_run

    begun = (out / "config.json").exists() and (out / "trajectory.zo").exists()
    whole_run({**options(name), "out": str(out), "overwrite": out.exists() and not begun}, begun)


def outcome_of(what: str, out: Path) -> Any:
    if what == "zo-finetune":
        from test_killed_runs import outcome

        return outcome(out)
    weights = {p.name: p.read_bytes() for p in sorted((out / "end").glob("*.safetensors"))}
    return weights, [(r.step, r.kind, r.losses) for r in zo.Trajectory.load(out / "trajectory.zo")]


def train(out: Path, name: str) -> None:
    from tiny_trainer import made

    trainer = made(out, **SAVED, **TRAINED[name])
    whole = [p for p in out.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    trainer.train(resume_from_checkpoint=bool(whole) or None)
    trainer.save_model(str(out / "end"))


DO: dict[str, Callable[[Path, str], None]] = {"zo-finetune": finetune, "trainer": train}


@cache
def undisturbed(what: str, name: str) -> tuple[Any, float]:
    out = Path(f"whole {what} {name}").absolute()
    options("mezo")
    began = time.monotonic()
    expect(in_child(_quiet(lambda: DO[what](out, name)), 120) == 0, f"{what}, {name}: it cannot run")
    return outcome_of(what, out), time.monotonic() - began


def _quiet(work: Callable[[], None]) -> Callable[[], None]:
    """Without its prints; errors go to a file."""

    def do() -> None:
        err = os.open("err.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()

    return do


def finished(what: str, out: Path) -> bool:
    return (out / "model" / "labels.json").exists() if what == "zo-finetune" else (out / "end").exists()


def attempt(case: Case) -> Result:
    what, name, way, seed = case
    draw = random.Random(seed)
    expected, seconds = undisturbed(what, name)
    out = Path(f"run-{seed}").absolute()
    kills = 0
    for life in range(6):
        seeded = draw.getrandbits(32)

        def live(seeded: int = seeded, last: bool = life == 5) -> None:
            own = random.Random(seeded)
            if not last:
                {
                    "call": lambda: kill_at_call(own.randint(1, 12000)),
                    "operation": lambda: kill_at_operation(own.randint(1, 200), own.random()),
                    "clock": lambda: kill_after(own.random() * seconds),
                }[way]()
            DO[what](out, name)

        status = in_child(_quiet(live), 120)
        if status == 0 or (status == -signal.SIGKILL and finished(what, out) and what == "zo-finetune"):
            break
        told = Path("err.txt").read_text(errors="replace")[-600:]
        expect(status == -signal.SIGKILL, f"{what}, {name}, {way}: life {life} ended with {status}: {told}")
        kills += 1
    got = outcome_of(what, out)
    keys = expected if isinstance(expected, dict) else range(len(expected))
    differ = [str(key) for key in keys if got[key] != expected[key]]
    expect(not differ, f"{what}, {name}, {way}: other {', '.join(differ)} after {kills} kills")
    shutil.rmtree(out)
    return Result(what, tally={"kills": kills, "lives": life + 1})
