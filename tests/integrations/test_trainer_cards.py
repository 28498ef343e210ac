"""What a run leaves to be read: its model card, and a folder for each trial of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
from tiny_trainer import METHODS, arguments, assert_same, made, seeded, tokens, trained, weights
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

import zo_kernels as zo
from zo_kernels.integrations.transformers import ZOTrainer

PAPERS = {
    "mezo": "2305.17333", "sparse-mezo": "2402.15751", "lezo": "2410.09823", "mezo-svrg": "2404.08080",
    "fzoo": "2506.09034",
}  # fmt: skip
TOLD: dict[str, str] = {
    "mezo": "MeZO of", "sparse-mezo": "sparsity=0.5", "lezo": "drop=0.5", "mezo-svrg": "anchor_lr=0.001",
    "fzoo": "estimator=one_sided, normalize=std",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_model_card_names_the_method(method: str, tmp_path: Path) -> None:
    options = {**METHODS[method][1], "directions": 2, "eps": 0.002, "distribution": "rademacher"}
    trainer = made(tmp_path, method=method, **options)
    trainer.create_model_card()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith("- optimizer:"))
    for told in (
        TOLD[method],
        f"arXiv {PAPERS[method]}",
        "learning_rate=0.001",
        "eps=0.002",
        "directions=2",
        "distribution=rademacher",
        "seed=42",
    ):
        assert told in line
    for wrong in ("sgd", "SGD", "Adam", "No additional optimizer arguments"):
        assert wrong not in card
    assert "- lr_scheduler_type: constant" in card


def test_the_model_card_of_a_run_and_of_another_trainer(tmp_path: Path) -> None:
    """Whose card does not tell of an optimizer, as TRL's."""

    class Short(Trainer):
        def create_model_card(self, **options: Any) -> None:
            (Path(self.args.output_dir) / "README.md").write_text("# It was trained.\n")

    class Both(ZOTrainer, Short):
        pass

    trainer = trained(tmp_path, cls=Both, objective="accuracy")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# It was trained.\n\n### Zeroth-order optimization\n\n- optimizer: MeZO of zo_kernels")
    assert card.endswith("\n- objective: accuracy\n")


class Trial(dict):
    """As much of optuna's as the Trainer asks."""

    def __init__(self, number: int, **values: Any):
        super().__init__(values)
        self.number, self.params = number, values


def test_each_trial_of_a_search_keeps_its_trajectory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its folder, by an optimizer of its own, from the weights of `model_init`."""
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)  # takes any
    args = arguments(tmp_path, max_steps=2)
    trainer = ZOTrainer(args=args, model_init=lambda: seeded(models.opt, 1), train_dataset=tokens())
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = dict
    ends = []
    for number, rate in enumerate((1e-3, 1e-2)):
        trainer.train(trial=Trial(number, learning_rate=rate, directions=1 + number))
        ends.append(weights(trainer.model))
    trainer.hp_search_backend = None
    trainer.train()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.zo*")) == [
        "run-0/trajectory.zo", "run-1/trajectory.zo", "trajectory.zo",
    ]  # fmt: skip
    for number, rate in enumerate((1e-3, 1e-2)):
        trajectory = zo.Trajectory.load(tmp_path / f"run-{number}" / "trajectory.zo")
        assert (trajectory.steps, trajectory[0].rates) == (2, pytest.approx((rate,)))
        assert len(trajectory[0].losses) == 1 + number
        start = seeded(models.opt, 1)
        zo.replay(start, trajectory)
        assert_same(weights(start), ends[number])
