"""Perturbation in the forward of transformers' models, and of adapters in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, family_loss
from outright import bits, holding, losses_outright, moved, trainable
from scripted import EPS, METHODS, SEED, assert_same, same_bits, snapshot, take_step
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import direction_seeds

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # a name of transformers 4

# Where the closure is called once more in the first step, for weights that are read where their module does not run.
AGAIN = {"Mamba"}


def made(family: str, layers: int = 2) -> nn.Module:
    """In evaluation mode, with normalisations that are not all ones."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FAMILIES[family][0](layers=layers).eval()
        for p in model.parameters():
            if p.dim() < 2:
                p.data += 0.3 * torch.randn_like(p)
        return model


class Losses:
    """A closure that keeps what it returned."""

    def __init__(self, family: str, model: nn.Module):
        self.family, self.model, self.seen = family, model, list[float]()

    def __call__(self) -> Tensor:
        loss = family_loss(self.family, self.model)
        self.seen.append(loss.item())
        return loss

    def expected(self, step: int = 0) -> list[float]:
        """In that step, by weights perturbed outright."""
        loss = lambda: family_loss(self.family, self.model)  # noqa: E731
        return losses_outright(self.model, loss, seed=SEED, step=step, eps=EPS)


def mezo(model: nn.Module, lr: float = 0.0, **options: Any) -> zo.MeZO:
    return zo.MeZO(model, lr=lr, eps=EPS, seed=SEED, perturb="in_forward", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_weights_perturbed_outright(family: str) -> None:
    model = made(family)
    opt, losses, before = mezo(model), Losses(family, model), snapshot(model)
    for step in range(2):
        losses.seen.clear()
        opt.step(losses)
        assert len(losses.seen) == 2 + (step == 0 and family in AGAIN)
        assert losses.seen[-2:] == losses.expected(step)
        assert len(set(losses.seen)) == len(losses.seen)
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("family", ["OPT", "Mixtral"])
def test_sixteen_bits_are_rounded_as_by_the_primitive(family: str, rounding: str) -> None:
    model = made(family).bfloat16()
    opt, losses, before = mezo(model, rounding=rounding), Losses(family, model), snapshot(model)
    opt.step(losses)
    assert_same(before, snapshot(model))
    (seed,) = direction_seeds(SEED, 0, 1)
    for seen, signed in zip(losses.seen, (EPS, -EPS), strict=True):
        with holding(model, moved(model, before, {seed: signed}, rounding=rounding)), torch.no_grad():
            assert family_loss(family, model).item() == seen


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_mode(reentrant: bool) -> None:
    model = made("Llama").train()  # without dropout
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses, before = Losses("Llama", model), snapshot(model)
    mezo(model).step(losses)
    assert losses.seen == losses.expected()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "family, ends", [("OPT", ("model.decoder.embed_tokens", "lm_head")), ("GPT-2", ("transformer.wte", "lm_head"))]
)
def test_tied_weights_are_perturbed_once_and_alike(family: str, ends: tuple[str, str]) -> None:
    model = made(family)
    modules = [model.get_submodule(name) for name in ends]
    assert modules[0].weight is modules[1].weight
    seen = []
    for module in modules:
        module.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()))
    mezo(model).step(Losses(family, model))
    (seed,) = direction_seeds(SEED, 0, 1)
    (name,) = [n for n, p in model.named_parameters() if p is modules[0].weight]
    for k, signed in enumerate((EPS, EPS, -EPS, -EPS)):
        assert same_bits(seen[k], moved(model, snapshot(model), {seed: signed})[name])


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda peft: peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "DoRA": lambda peft: peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "prefix": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "LoRA of an embedding": lambda peft: peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
}


def adapted(family: str, adapter: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = made(family)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return peft.get_peft_model(model, ADAPTERS[adapter](peft)).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("family", ["OPT", "Llama"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_alone_are_perturbed_and_updated(adapter: str, family: str) -> None:
    model = adapted(family, adapter)
    losses, before = Losses(family, model), snapshot(model)
    mezo(model).step(losses)
    assert losses.seen[-2:] == losses.expected()
    assert_same(before, snapshot(model))
    mezo(model, lr=1.0).step(losses)
    after, ours = snapshot(model), trainable(model)
    assert 0 < len(ours) < len(before)
    assert_same(before, after, only=set(before) - set(ours))
    assert not any(same_bits(before[name], after[name]) for name in ours)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_sixteen_bit_models(method: str) -> None:
    """They are perturbed in the forward without being told, and nothing but a step's end changes a weight."""
    model = adapted("Llama", "LoRA").bfloat16()
    options = {"anchor_lr": 1.0, "anchor_every": 2} if method == "MeZOSVRG" else {}
    opt = METHODS[method](model, lr=1.0, eps=EPS, seed=SEED, **options)
    assert opt.perturb == "in_forward"
    ours, start = trainable(model), snapshot(model)
    for _ in range(3):
        before = {name: bits(p) for name, p in model.named_parameters()}

        def closure(before: dict[str, bytes] = before) -> Tensor:
            loss = family_loss("Llama", model)
            assert {name: bits(p) for name, p in model.named_parameters()} == before
            return loss

        take_step(opt, closure)
    changed = {name for name, t in snapshot(model).items() if not same_bits(start[name], t)}
    assert changed and changed <= set(ours)
    assert changed == set(ours) or method == "LeZO"  # which drops half of the blocks, and may do so again
