"""Adapters: what is frozen stays as it is to the last bit, by the trainer and by the optimizers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tiny_trainer import METHODS, assert_same, losses, made, seeded, tokens, trained, weights
from torch import nn

import zo_kernels as zo

peft = pytest.importorskip("peft")

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def lora(base: Any = None, **options: Any) -> nn.Module:
    base = models.llama(2) if base is None else base
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **options}))


def prefix() -> nn.Module:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(models.llama(2), config)


def prompt() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(models.llama(2), config)


def with_modules_to_save() -> nn.Module:
    return lora(modules_to_save=["lm_head"])


def tied() -> nn.Module:
    """The output embedding is the frozen input embedding."""
    return lora(models.opt(2))


class Int8Linear(nn.Module):
    """A frozen layer of 8-bit weights, as quantised models have them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised() -> nn.Module:
    model = lora()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in ("base_layer", "up_proj", "gate_proj", "down_proj"):
                setattr(module, name, Int8Linear(child))
    return model


def in_4_bits() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = models.llama(2)
    for module in list(base.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                quantised = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, False, quant_type="nf4")
                quantised.load_state_dict(child.state_dict())
                setattr(module, name, quantised.to("cpu"))
    model = lora(base)
    assert torch.uint8 in {p.dtype for p in model.parameters()}
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lora,
    "prefix": prefix,
    "prompt": prompt,
    "modules_to_save": with_modules_to_save,
    "tied": tied,
    "8 bits": quantised,
    "4 bits of bitsandbytes": in_4_bits,
}


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
@pytest.mark.parametrize("kind", MODELS)
def test_only_what_is_trainable_changes(kind: str, perturb: str, tmp_path: Path) -> None:
    model = seeded(MODELS[kind])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = everything(model)
    trainer = trained(tmp_path, model, perturb=perturb, objective="accuracy" if kind == "prompt" else "loss")
    after = everything(model)
    assert trainer.zo_optimizer.step_count == 4
    assert trainer.zo_optimizer.refused_steps == 0
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= trainable
    if kind != "prompt":  # whose accuracy may have been the same on both sides
        assert changed == trainable


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers; a state dict of a PEFT model has fewer."""
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("method", METHODS)
def test_optimizers_alone(method: str) -> None:
    model = seeded(lora).eval()
    before = everything(model)
    cls, options = METHODS[method]
    optimizer: Any = cls(model, lr=1e-2, **options)
    ids = torch.arange(2, 10).view(1, 8)

    def closure() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    for _ in range(3):
        optimizer.step(*[closure] * (2 if method == "mezo-svrg" else 1))
    changed = {name for name, t in everything(model).items() if not torch.equal(before[name], t)}
    assert changed
    assert all("lora_" in name for name in changed)


def test_the_noise_of_an_adapter_does_not_depend_on_what_else_is_trained() -> None:
    """A step of LoRA's weights alone is that part of a step of all weights."""
    alone, together = seeded(lora).eval(), seeded(lora).eval()
    together.requires_grad_(True)
    for model in (alone, together):
        calls = iter([1.0, 0.0])
        zo.MeZO(model, lr=1e-2, perturb="in_forward").step(lambda m=model, c=calls: run(m) + next(c))
    ours, theirs = everything(alone), everything(together)
    for name in ours:
        if "lora_" in name:
            assert torch.equal(ours[name], theirs[name]), name


def run(model: nn.Module) -> float:
    """Nothing but a forward: the loss is the caller's, so that both models have the same."""
    model(input_ids=torch.arange(2, 10).view(1, 8))
    return 0.0


@pytest.mark.parametrize("kind", ["LoRA", "modules_to_save"])
def test_an_adapter_is_saved_and_resumed(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = trained(tmp_path, seeded(MODELS[kind]), **options)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    again = made(tmp_path, seeded(MODELS[kind]), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    assert_same(everything(again.model), everything(whole.model))
    start = seeded(MODELS[kind])
    zo.replay(start, tmp_path / "trajectory.zo")
    assert_same(everything(start), everything(whole.model))
    assert_same(weights(start), weights(whole.model))


def test_tokens_of_a_prompt_are_no_labels(tmp_path: Path) -> None:
    trainer = made(tmp_path, seeded(prompt).eval(), objective="accuracy")
    batch = torch.utils.data.default_collate(tokens(2))
    with torch.no_grad():
        error = trainer._closure(trainer.model, [batch], None)()
        logits = trainer.model(**batch).logits
    assert logits.shape[1] == 8 + 3
    expected = (logits[:, 3:-1].argmax(-1) != batch["labels"][:, 1:]).double().mean()
    assert error.item() == pytest.approx(expected.item(), rel=1e-6)
