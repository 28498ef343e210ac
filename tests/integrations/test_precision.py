"""Losses of models in 16 bits are those of float32 logits, or it is said what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import HEADS, ROWS, divided, rows
from tiny_trainer import Kept, made, seeded, trained, weights
from tolerances import loss_slope, of_16_bits
from torch import Tensor, nn
from torch.nn import functional

import zo_kernels as zo
from zo_kernels.integrations.transformers import ZOTrainer
from zo_kernels.integrations.transformers.precision import float32_losses

MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
# Each head whose loss would be of 16 bits -> that loss in float32.
SIXTEEN: dict[str, Callable[[Any, Any], Tensor]] = {
    "sequence": lambda out, batch: functional.cross_entropy(out.logits.float(), batch["labels"]),
    "regression": lambda out, batch: functional.mse_loss(out.logits.float().squeeze(), batch["labels"]),
    "multi-label": lambda out, batch: functional.binary_cross_entropy_with_logits(out.logits.float(), batch["labels"]),
    "multiple choice": lambda out, batch: functional.cross_entropy(out.logits.float(), batch["labels"]),
    "token": lambda out, batch: of_tokens(out, batch),
    "masked": lambda out, batch: of_tokens(out, batch),
    "seq2seq of T5": lambda out, batch: of_tokens(out, batch),
    "seq2seq of BART": lambda out, batch: of_tokens(out, batch),
}


def of_tokens(outputs: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(outputs.logits.float().flatten(0, 1), batch["labels"].flatten())


def is_of(dtype: torch.dtype, loss: float) -> bool:
    return torch.tensor(loss, dtype=torch.float64).to(dtype).double().item() == loss


def losses_of(optimizer: zo.ZeroOrderOptimizer) -> list[tuple[float, float]]:
    return [record.losses[0] for record in optimizer.trajectory]


@pytest.mark.parametrize(
    ("head", "dtype"),
    [*((head, torch.bfloat16) for head in SIXTEEN), ("sequence", torch.float16), ("seq2seq of T5", torch.float16)],
    ids=str,
)
def test_a_step_is_by_losses_of_float32(head: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit those of a closure that makes float32 logits, and near those of the model in float32."""
    kind, build = HEADS[head]
    options: dict[str, Any] = {
        "learning_rate": 0.0, "max_steps": 2, "per_device_train_batch_size": ROWS, "eps": 1e-2, "perturb": "in_forward",
    }  # fmt: skip
    model, kept = seeded(build).to(dtype), Kept()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = trained(tmp_path / "a", model, rows(kind), data_collator=kept, **options)
    hand = seeded(build).to(dtype).eval()
    optimizer = zo.MeZO(hand, lr=0.0, eps=1e-2, seed=trainer.args.seed)
    largest = 0.0
    for batch in kept.batches:
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
        optimizer.step(lambda inputs=inputs, batch=batch: SIXTEEN[head](hand(**inputs), batch))
        largest = max(largest, hand(**inputs).logits.abs().max().item())
    found = losses_of(trainer.zo_optimizer)
    assert found == losses_of(optimizer)
    assert not any(is_of(dtype, plus) and is_of(dtype, minus) for plus, minus in found)
    whole = trained(tmp_path / "b", seeded(build), rows(kind), **options)
    # The residuals of a regression are larger than its logits.
    error = of_16_bits(max(largest, 1.0) * (5 if head == "regression" else 1), MANTISSA[dtype], 16, ROWS)
    for (plus, minus), (plus32, minus32) in zip(found, losses_of(whole.zo_optimizer), strict=True):
        assert (plus - minus) / 2e-2 == pytest.approx((plus32 - minus32) / 2e-2, rel=0, abs=loss_slope(error, 1e-2))
        assert plus != minus


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.2}, {"compute_loss_func": divided}],
    ids=lambda options: next(iter(options)),
)
def test_logits_that_the_trainer_makes_a_loss_of(options: dict[str, Any], tmp_path: Path) -> None:
    """And an evaluation's loss; what it predicts remains of 16 bits."""
    model = seeded(HEADS["masked"][1]).bfloat16()
    trainer = trained(tmp_path, model, rows("tokens"), eval_dataset=rows("tokens"), max_steps=1, **options)
    assert not any(is_of(torch.bfloat16, loss) for pair in losses_of(trainer.zo_optimizer) for loss in pair)
    assert not is_of(torch.bfloat16, trainer.evaluate()["eval_loss"])
    batch = torch.utils.data.default_collate(rows("tokens")[:2])
    assert trainer.prediction_step(model, batch, False)[1].dtype == torch.bfloat16


class OfItsOwn(ZOTrainer):
    """A loss that nothing can be done about."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **told: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.logits.square().mean() + 1
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_in_16_bits_all_the_same_is_said(accumulated: int, tmp_path: Path) -> None:
    model = seeded(HEADS["masked"][1]).bfloat16()
    with pytest.warns(UserWarning, match="projected gradient") as told:
        trained(tmp_path, model, rows("tokens"), cls=OfItsOwn, gradient_accumulation_steps=accumulated)
    (message,) = [str(w.message) for w in told if "projected gradient" in str(w.message)]
    assert "got one in bfloat16: near 1 it is a multiple of 0.0078" in message
    assert "so that the projected gradient is one of 3.91 (eps=0.001), and mostly 0" in message


def test_a_loss_in_16_bits_is_an_error_of_a_strict_optimizer(tmp_path: Path) -> None:
    model = seeded(HEADS["masked"][1]).bfloat16()
    before = weights(model)
    trainer = made(
        tmp_path, model, rows("tokens"), cls=OfItsOwn, optimizers=(zo.MeZO(model, lr=1e-3, strict=True), None)
    )
    with pytest.raises(ValueError, match=r"compute_loss: expected a loss in float32, got one in bfloat16"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert functional.cross_entropy.__module__ == "torch.nn.functional"


def test_functions_of_pytorch_come_back(tmp_path: Path) -> None:
    """They are others for as long as somebody needs them, whoever ends first."""
    trainer = made(tmp_path)
    own = {name: value for name, value in vars(functional).items() if callable(value)}
    x, y = torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)
    one, two = float32_losses(trainer), float32_losses(trainer)
    for entered in (one, two):
        entered.__enter__()
        assert nn.MSELoss()(x, target=y).dtype == functional.mse_loss(x, y).dtype == torch.float32
        assert functional.mse_loss(x.double(), y.double()).dtype == torch.float64
    meanwhile = functional.mse_loss
    two.__exit__(None, None, None)
    assert functional.mse_loss is meanwhile
    one.__exit__(None, None, None)
    assert {name: value for name, value in vars(functional).items() if callable(value)} == own
    assert nn.MSELoss()(x, y).dtype == torch.bfloat16
    with float32_losses(trainer):
        assert functional.mse_loss is meanwhile  # the same object, for torch.compile
