"""Who asks whether a step is training is told so; a forward, whoever calls it, is told that it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tiny_trainer import made, points, trained
from torch import Tensor, nn

from zo_kernels.integrations.transformers import ZOTrainer
from zo_kernels.integrations.transformers.evaluation import counted_once, evaluation_mode


class DropsAtTheRoot(nn.Module):
    """As no model of transformers does: what is outermost draws, by `self.training`."""

    def __init__(self, p: float):
        super().__init__()
        self.net, self.p = models.block_mlp(2), p

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = nn.functional.dropout(self.net(x), self.p, training=self.training)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Filing(ZOTrainer):
    """Files its metrics as the trainers of TRL do, and calls the model's forward as it likes."""

    passing_hooks_by = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.filed = [*getattr(self, "filed", []), ("loss", model.training, self.model.training)]
        outputs = (model.forward if self.passing_hooks_by else model)(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        kind = "eval log" if "eval_loss" in logs else "log"
        self.filed = [*getattr(self, "filed", []), (kind, self.model.training, self.model.training)]
        super().log(logs, *args, **options)


class PassingHooksBy(Filing):
    passing_hooks_by = True


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("cls", [Filing, PassingHooksBy])
def test_metrics_are_filed_as_of_training_though_nothing_is_dropped(cls: Any, perturb: str, tmp_path: Path) -> None:
    """Of a model that comes in evaluation mode, as from_pretrained leaves it, too."""
    options: dict[str, Any] = {
        "perturb": perturb, "learning_rate": 0.0, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1,
        "eval_dataset": points(2),
    }  # fmt: skip
    trainer = trained(tmp_path, DropsAtTheRoot(0.5).eval(), points(), cls=cls, **options)
    step = [("loss", True, True)] * 2 + [("log", True, True), ("loss", False, False), ("eval log", False, False)]
    assert trainer.filed[:10] == step * 2
    plain = trained(tmp_path / "plain", DropsAtTheRoot(0.0), points(), **options)
    pairs = [[record.losses for record in t.zo_optimizer.trajectory] for t in (trainer, plain)]
    assert pairs[0] == pairs[1]


class Fails(DropsAtTheRoot):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        assert not self.training
        raise RuntimeError("no forward")


def test_modes_and_forward_come_back_after_an_exception(tmp_path: Path) -> None:
    trainer = made(tmp_path, Fails(0.5), points())
    trainer.model.net.head.eval()
    modes = {name: m.training for name, m in trainer.model.named_modules()}
    with pytest.raises(RuntimeError, match=r"no forward"), evaluation_mode(trainer.model):
        assert [name for name, m in trainer.model.named_modules() if m.training] == [""]
        trainer.compute_loss(trainer.model, points()[0])
    assert {name: m.training for name, m in trainer.model.named_modules()} == modes
    assert "forward" not in vars(trainer.model)


def test_a_forward_of_ones_own_comes_back() -> None:
    """As accelerate puts it in the place of the class's."""
    model, seen = DropsAtTheRoot(0.5), []
    model.forward = own = lambda: seen.append(model.training)  # type: ignore[method-assign]
    with evaluation_mode(model):
        model()
        seen.append(model.training)
    assert vars(model)["forward"] is own
    model()
    assert seen == [False, True, True]


def test_tokens_are_counted_once_a_step(tmp_path: Path) -> None:
    """However many evaluations a step has; those of an anchor's batches count none."""

    class Counts:
        _total_train_tokens = 5

    def add(n: int) -> Any:
        def closure() -> Tensor:
            counts._total_train_tokens += n
            return torch.zeros(())

        return closure

    counts = Counts()
    first, full = counted_once(counts, [add(7), add(100)])
    for closure in (first, full, first, full, first):
        closure()
    assert counts._total_train_tokens == 12
    assert counted_once(object(), [first]) == [first]
