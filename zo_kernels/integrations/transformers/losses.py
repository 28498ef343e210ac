"""The loss of a step: the mean over all items of its micro-batches, in all processes.

transformers' Trainer adds up the losses of micro-batches that were told the number of a step's items, and trusts that
each was divided by it. Heads that leave it alone return a mean, and their sum is as many times too large as there are
micro-batches, and processes (transformers#47688). So here each micro-batch is told its own share of the number, as if
it were a step of its own, and what it returns is weighted by the same share. With w the share, S the sum over its
items and n the step's number: a loss that is divided gives w S / (w n) = S / n, one that is not gives w times its mean,
and one that is so in parts (with a router's loss beside the tokens') the right thing of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.integrations.transformers import objectives
from zo_kernels.integrations.transformers.evaluation import float64
from zo_kernels.integrations.transformers.precision import doubt_16_bits, float32_losses

Term = Callable[[], Any]


def closure_of(trainer: Any, model: nn.Module, batches: Sequence[Any], num_items: Any) -> Callable[[], Tensor]:
    """The closure of a step. It returns the loss over all micro-batches, a float64 scalar on the device.

    In float64 sums of float32 losses are exact, or nearly so: they do not depend on how many of the micro-batches
    are another process's.

    Args:
        trainer: a ZOTrainer.
        batches: this process's.
        num_items: as `Trainer.get_batch_samples` counts them; None if it does not.
    """
    scaled = trainer._objective == "loss" and bool(getattr(trainer, "loss_is_scaled_for_ga", None))
    terms, weights = _terms(trainer, model, batches, num_items, scaled)

    def closure() -> Tensor:
        with ExitStack() as within:
            within.enter_context(trainer.compute_loss_context_manager())
            within.enter_context(float32_losses(trainer))
            if not scaled:
                within.enter_context(alone(trainer))
            values = [_checked(trainer, term()) for term in terms]
        if not isinstance(weights, Tensor):
            return sum(values[1:], values[0]) * weights
        parts = torch.where(weights == 0, 0.0, torch.stack(values) * weights)  # the mean over no items is nan
        return parts.sum()

    return closure


def _checked(trainer: Any, value: Any) -> Tensor:
    doubt_16_bits(trainer.zo_optimizer, value)
    return float64(value, trainer.args.device)


def _terms(
    trainer: Any, model: nn.Module, batches: Sequence[Any], num_items: Any, scaled: bool
) -> tuple[list[Term], Tensor | float]:
    """A function for the loss of each micro-batch, and the weights of these losses: one each, or one for all."""

    def loss_of(batch: Any, items: Any) -> Any:
        # A copy, because compute_loss may take the labels out.
        return trainer.compute_loss(model, copy.copy(batch), num_items_in_batch=items)

    def outputs_of(batch: Any) -> Any:
        return trainer.compute_loss(model, copy.copy(batch), return_outputs=True, num_items_in_batch=num_items)[1]

    if scaled:
        return [partial(loss_of, batch, num_items) for batch in batches], 1.0
    if trainer._objective == "loss":
        told, weights = _shares(trainer, batches, num_items)
        return [partial(loss_of, batch, own) for batch, own in zip(batches, told, strict=True)], weights
    if trainer._objective == "accuracy":
        shifted = objectives.predicts_the_next_token(trainer.model)
        labels = [objectives.labels_of(batch, shifted) for batch in batches]
        total, processes = sum(map(objectives.count, labels)), 1
        if trainer.accelerator.num_processes > 1 and trainer.args.parallel != "directions":
            total = trainer.accelerator.reduce(total, "sum")
            processes = trainer.accelerator.num_processes  # over which there will be a mean

        def error_rate(batch: Any) -> Tensor:
            wrong = objectives.errors(outputs_of(batch), objectives.labels_of(batch, shifted), shifted)
            return wrong / total * processes

        return [partial(error_rate, batch) for batch in batches], 1.0

    def given(batch: Any) -> Any:
        return trainer._objective(model, batch, outputs_of(batch))

    return [partial(given, batch) for batch in batches], 1 / len(batches)


def _shares(trainer: Any, batches: Sequence[Any], num_items: Any) -> tuple[Sequence[Any], Tensor | float]:
    """The number of items that each micro-batch is told, and the weight of its loss."""
    # Those over which the optimizer will take a mean that all items have an equal part in.
    processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    if _adds_up(trainer):
        return [num_items] * len(batches), float(processes)
    if len(batches) == processes == 1:
        return [num_items], 1.0
    counts = torch.stack([float64(items(batch, trainer), trainer.args.device) for batch in batches])
    total = counts.sum()
    if processes > 1:
        total = trainer.accelerator.reduce(total, "sum")
    # Weights of 24 bits, so that products with float32 losses are exact.
    weights = (counts / total * processes).float().double()
    if num_items is None:
        return [None] * len(batches), weights
    # Ranks of tensor parallelism are counted once in it.
    copies = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    return list((torch.as_tensor(num_items, device=counts.device) * copies * counts / total).float()), weights


def items(batch: Any, trainer: Any) -> Tensor | int:
    """The number of items that the loss of a batch is a mean over: labels that count, or else examples."""
    model, named = objectives.unwrapped(trainer.model), batch if hasattr(batch, "get") else {}
    if isinstance(made := named.get("shift_labels"), Tensor):  # by a collator
        return objectives.count(made)
    labels = named.get("labels")
    if not isinstance(labels, Tensor) or _is_ctc(model):
        tensors = [value for value in named.values() if isinstance(value, Tensor) and value.dim() > 0]
        return len(tensors[0]) if tensors else 1
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return labels.numel()
    shifted = getattr(trainer, "_loss_shifts_labels", False) or objectives.predicts_the_next_token(model)
    if shifted and labels.dim() > 1:
        labels = labels[..., 1:]
    ignored = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", None)
    if ignored is not None and "SemanticSegmentation" in type(model).__name__:
        labels = labels.masked_fill(labels == ignored, objectives.IGNORED)
    return objectives.count(labels)


def _is_ctc(model: Any) -> bool:
    """Whether its loss is one of sequences, not of tokens."""
    return type(model).__name__.endswith("ForCTC")


def _adds_up(trainer: Any) -> bool:
    """Whether its loss is a sum over the examples, as CTC of speech models is by default."""
    base = objectives.unwrapped(trainer.model)
    own = trainer.compute_loss_func is None and _is_ctc(base)
    return own and getattr(getattr(base, "config", None), "ctc_loss_reduction", None) == "sum"


@contextmanager
def alone(trainer: Any) -> Iterator[None]:
    """Let `compute_loss` see one micro-batch a step and one process, so that it scales the loss by neither."""
    changed = (
        (trainer.args, "average_tokens_across_devices", False),
        (trainer.args, "gradient_accumulation_steps", 1),
        (trainer, "current_gradient_accumulation_steps", 1),
    )
    own = [(of, name, vars(of)[name], value) for of, name, value in changed if name in vars(of)]
    try:
        for of, name, _, value in own:
            setattr(of, name, value)
        yield
    finally:
        for of, name, before, _ in own:
            setattr(of, name, before)
