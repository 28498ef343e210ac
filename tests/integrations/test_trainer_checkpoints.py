"""A run that goes on from a checkpoint ends with the bits of one that was never cut off."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import children
import models
import pytest
import torch
from tiny_trainer import METHODS, assert_same, losses, made, seeded, tokens, trained, weights
from transformers import TrainerCallback

import zo_kernels as zo
from zo_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments, checkpoints

RUNS = {
    **{method: {**options, "method": method} for method, (_, options) in METHODS.items()},
    "accumulated, decayed": {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "weight_decay": 0.1},
    "bf16": {"rounding": "stochastic", "distribution": "rademacher"},
}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}


def model_of(run: str) -> Any:
    model = seeded(models.opt, 2)
    return model.bfloat16() if run == "bf16" else model


def assert_replays(folder: Path, run: str, expected: Any, upto: int | None = None) -> None:
    start = model_of(run)
    zo.replay(start, folder / "trajectory.zo", upto)
    assert_same(weights(start), expected)


@pytest.mark.parametrize("run", RUNS)
def test_resumed_bit_for_bit(run: str, tmp_path: Path) -> None:
    whole = trained(tmp_path, model_of(run), **SAVED, **RUNS[run])
    expected, logged = weights(whole.model), losses(whole)
    assert_replays(tmp_path, run, expected)
    at_four = weights(type(whole.model).from_pretrained(tmp_path / "checkpoint-4", dtype=whole.model.dtype))
    assert_replays(tmp_path / "checkpoint-4", run, at_four)
    again = made(tmp_path, model_of(run), **SAVED, **RUNS[run])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == logged
    assert_same(weights(again.model), expected)
    assert_replays(tmp_path, run, expected)
    # And once more by the trainer that has been there already.
    again.train(resume_from_checkpoint=True)
    assert losses(again) == logged
    assert_same(weights(again.model), expected)
    assert zo.Trajectory.load(tmp_path / "trajectory.zo").steps == 7


class KilledAt(TrainerCallback):
    """Kills the process, as a cluster would, at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(out: Path, step: int) -> None:
    torch.set_num_threads(1)
    trained(out, callbacks=[KilledAt(step)], **SAVED)


def test_killed_and_resumed(tmp_path: Path) -> None:
    process = children.context().Process(target=run_and_die, args=(tmp_path / "killed", 5))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert zo.Trajectory.load(tmp_path / "killed" / "trajectory.zo").steps == 5  # more than the checkpoint's 4
    # The next one was killed in the middle of writing: no trainer_state.json.
    unfinished = tmp_path / "killed" / "checkpoint-6"
    shutil.copytree(tmp_path / "killed" / "checkpoint-4", unfinished)
    (unfinished / "trainer_state.json").write_text('{"epoch": ')
    resumed = made(tmp_path / "killed", **SAVED)
    resumed.train(resume_from_checkpoint=True)
    whole = trained(tmp_path / "whole", **SAVED)
    assert_same(weights(resumed.model), weights(whole.model))
    assert losses(resumed) == losses(whole)
    assert_replays(tmp_path / "killed", "mezo", weights(whole.model))


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory"):
        made(tmp_path).train(resume_from_checkpoint=True)
    trained(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    assert not (tmp_path / "checkpoint-4" / "trajectory.zo").exists()
    assert (tmp_path / "trajectory.zo").exists()
    with pytest.raises(ValueError, match=r"without optimizer.pt, scheduler.pt, trajectory.zo \(save_only_model=True"):
        made(tmp_path).train(resume_from_checkpoint=True)


def test_an_optimizer_of_ones_own_is_resumed_and_never_replaced(tmp_path: Path) -> None:
    def with_own(model: Any) -> ZOTrainer:
        return made(tmp_path, model, optimizers=(zo.MeZO(model, lr=1e-3, seed=7), None), **SAVED)

    whole, again = with_own(model_of("mezo")), with_own(model_of("mezo"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(weights(again.model), weights(whole.model))
    with pytest.raises(ValueError, match=r"resume: expected an optimizer made without trajectory="):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resuming_as_another_method_or_with_another_distribution(tmp_path: Path) -> None:
    """Those of versions that knew normals alone, too; and by an optimizer of one's own."""
    model = model_of("mezo")
    own = zo.MeZO(model, lr=1e-3, distribution="rademacher")
    trained(tmp_path, **SAVED)
    path = tmp_path / "checkpoint-7" / "zo_trainer.json"
    began = "with which the run to be resumed began, got"
    for _ in range(2):
        for trainer, told in (
            (made(tmp_path, method="lezo", **SAVED), f"method: expected 'mezo', {began} 'lezo'"),
            (made(tmp_path, distribution="rademacher", **SAVED), f"distribution: expected 'normal', {began} 'radema"),
            (made(tmp_path, model, optimizers=(own, None), **SAVED), f"distribution: expected 'normal', {began}"),
        ):
            with pytest.raises(ValueError, match=told):
                trainer.train(resume_from_checkpoint=True)
        before = json.loads(path.read_bytes())
        before.pop("distribution", None)
        path.write_text(json.dumps(before))
    assert own.distribution == "rademacher"
    made(tmp_path, **SAVED).train(resume_from_checkpoint=True)


def test_limits_and_the_best_model(tmp_path: Path) -> None:
    """What is loaded at the end is what the trajectory gives at the best step."""
    trainer = trained(
        tmp_path, **{**SAVED, "max_steps": 6}, save_total_limit=1, load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=2, eval_dataset=tokens(4), metric_for_best_model="loss", learning_rate=0.05,
    )  # fmt: skip
    best = trainer.state.best_global_step
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{best}"]
    assert_replays(tmp_path, "mezo", weights(trainer.model), upto=best)
    assert_replays(tmp_path / f"checkpoint-{best}", "mezo", weights(trainer.model))


def test_a_new_run_replaces_the_trajectory_of_an_old_one(tmp_path: Path) -> None:
    first = trained(tmp_path, **SAVED)
    kept = (tmp_path / "checkpoint-6" / "trajectory.zo").read_bytes()
    second = trained(tmp_path, seed=1)
    assert zo.Trajectory.load(tmp_path / "trajectory.zo") == second.zo_optimizer.trajectory
    assert second.zo_optimizer.trajectory != first.zo_optimizer.trajectory
    assert (tmp_path / "checkpoint-6" / "trajectory.zo").read_bytes() == kept
    assert zo.Trajectory.load(tmp_path / "trajectory.zo.replaced-1") == first.zo_optimizer.trajectory


def test_going_back_keeps_what_came_after(tmp_path: Path) -> None:
    """Of a checkpoint that is not the last; steps after the last one are taken again, and nothing is left beside."""
    trained(tmp_path, **SAVED)
    shutil.rmtree(tmp_path / "checkpoint-7")
    whole = (tmp_path / "trajectory.zo").read_bytes()
    checkpoints.take_back(str(tmp_path / "checkpoint-6"), tmp_path)
    assert whole.startswith((tmp_path / "trajectory.zo").read_bytes())
    assert not list(tmp_path.glob("*.replaced-*"))
    (tmp_path / "trajectory.zo").write_bytes(whole)
    checkpoints.take_back(str(tmp_path / "checkpoint-2"), tmp_path)
    assert zo.Trajectory.load(tmp_path / "trajectory.zo").steps == 2
    assert (tmp_path / "trajectory.zo.replaced-1").read_bytes() == whole


def test_damaged_checkpoints_are_passed_over_or_refused(tmp_path: Path) -> None:
    trained(tmp_path, **{**SAVED, "max_steps": 6})
    (tmp_path / "checkpoint-6" / "scheduler.pt").write_bytes(b"")
    assert checkpoints.last_whole(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-5")
    for state in (b"", b"[1]", b"{" * 100_000, b"\xff", b"null"):
        (tmp_path / "checkpoint-6" / "trainer_state.json").write_bytes(state)
        assert checkpoints.last_whole(tmp_path) == str(tmp_path / "checkpoint-2")
    told = tmp_path / "checkpoint-2" / "zo_trainer.json"
    sound = json.loads(told.read_bytes())
    for field, wrong in (
        ("version", 2), ("version", "1"), ("distribution", None), ("options", {}), ("data", {"epoch": 1}), ("data", [])
    ):  # fmt: skip
        told.write_text(json.dumps({**sound, field: wrong}))
        with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected .*checkpoint-2/zo_trainer\.json"):
            made(tmp_path, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    damaged = tmp_path / "checkpoint-2" / "trajectory.zo"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = (tmp_path / "trajectory.zo").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint-2/trajectory.zo: record"):
        checkpoints.take_back(str(tmp_path / "checkpoint-2"), tmp_path)
    assert (tmp_path / "trajectory.zo").read_bytes() == before


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(models.opt, 2)
    start = copy.deepcopy(model)
    monkeypatch.setattr(ZOTrainer, "is_world_process_zero", lambda self: False)
    monkeypatch.setattr(ZOTrainingArguments, "should_save", False)
    trainer = trained(tmp_path, model, **SAVED)
    assert not list(tmp_path.rglob("*.zo"))
    zo.replay(start, trainer.zo_optimizer.trajectory)
    assert_same(weights(start), weights(model))
