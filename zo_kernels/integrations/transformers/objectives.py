"""Objectives to minimise instead of the loss. They need no gradient, since nothing is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Objective = Callable[[nn.Module, Mapping[str, Any], Any], "Tensor | float"]
IGNORED = -100


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch.compile and peft."""
    base = getattr(model, "_orig_mod", model)
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def predicts_the_next_token(model: Any) -> bool:
    """Whether the logits at one token are about the next one's label, as in a causal language model."""
    return type(unwrapped(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def labels_of(inputs: Mapping[str, Any], shifted: bool) -> Tensor:
    """int64 [batch], or [batch, tokens] of which the first is left out if `shifted`; -100 is to be ignored.

    Raises ValueError if there are no labels, or none that a class can be compared with.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        got = f"{labels.dtype} ones" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"objective: 'accuracy' expected integer labels in the batch, got {got}; use 'loss'")
    return labels[..., 1:] if shifted else labels


def count(labels: Tensor) -> Tensor:
    """The number of labels that are not to be ignored."""
    return (labels != IGNORED).sum()


def errors(outputs: Any, labels: Tensor, shifted: bool) -> Tensor:
    """The number of labels that differ from the class of the largest logit.

    Args:
        outputs: of the model: a mapping with "logits", or a tuple of the loss and the logits; [..., classes].
        labels: as `labels_of` returns them.
        shifted: as for `labels_of`.

    Raises ValueError if the logits do not fit to the labels.
    """
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
    if shifted and logits.dim() == 3:
        logits = logits[:, -labels.shape[-1] - 1 : -1]  # prompt tuning has put virtual tokens before the others
    if logits.dim() != labels.dim() + 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"objective: 'accuracy' expected logits of shape {(*labels.shape, 'classes')}, got {tuple(logits.shape)}; "
            "pass a function as ZOTrainer(objective=...)"
        )
    return torch.count_nonzero((logits.argmax(-1) != labels) & (labels != IGNORED))
