"""`TrainingArguments` with the options of zeroth-order training, and without those that need a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from zo_kernels import checks
from zo_kernels.estimators.draws import MAX_DIRECTIONS
from zo_kernels.ops import ROUNDINGS
from zo_kernels.optim.base import PERTURB
from zo_kernels.ranks.parallel import SPLITS

METHODS = ("mezo", "sparse-mezo", "lezo", "mezo-svrg")
OBJECTIVES = ("loss", "accuracy")
_ANCHOR = ("anchor_every", "anchor_lr", "anchor_examples")

_ADAM = "the update is plain SGD along the estimated gradient; choose it by method=, learning_rate= and weight_decay="
_NO_ACTIVATIONS = "without a backward pass no activations are kept, so there are none to recompute; leave it out"
_NO_DDP = "the model is not wrapped in DistributedDataParallel, since there are no gradients to reduce; leave it out"
_ONE_COPY = (
    "every process of torchrun holds the whole model, at the memory of inference; leave it out, and for a model larger "
    "than the GPU set offload=True, or shard it with fully_shard in a loop of your own"
)
# What has no meaning without gradients: field -> what to do instead.
_WITHOUT_MEANING = {
    "optim": _ADAM,
    "optim_args": _ADAM,
    "optim_target_modules": _ADAM,
    "adam_beta1": _ADAM,
    "adam_beta2": _ADAM,
    "adam_epsilon": _ADAM,
    "max_grad_norm": "there is no gradient to clip; a smaller learning_rate or larger eps bounds the update",
    "activation_checkpointing": _NO_ACTIVATIONS,
    "gradient_checkpointing": _NO_ACTIVATIONS,
    "fp16": "there are no gradients to scale; load the model in float16 (dtype=torch.float16), or set bf16=True",
    "deepspeed": _ONE_COPY,
    "fsdp": _ONE_COPY,
    "neftune_noise_alpha": "its noise belongs to training mode, and the forwards of a step run in evaluation mode",
    "auto_find_batch_size": "it starts the run anew after steps were taken; lower per_device_train_batch_size instead",
    "ddp_find_unused_parameters": _NO_DDP,
    "ddp_bucket_cap_mb": _NO_DDP,
    "ddp_broadcast_buffers": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
}


@dataclass(repr=False)  # that of TrainingArguments leaves tokens out
class ZOTrainingArguments(TrainingArguments):
    """The settings of a `ZOTrainer`: those of `TrainingArguments`, and those of the optimizers of zo_kernels.

    Four defaults are others: `learning_rate` is 1e-6, `max_grad_norm` 0, `optim` "sgd", which is what the update along
    the estimated gradient is, and `logging_nan_inf_filter` False, because a refused step's loss is left out of the logs
    without it, and without waiting for a GPU. docs/trainer.md says what each option means.

    Raises:
        TypeError, ValueError: an option is out of range, belongs to another method, or has no meaning without
            gradients; the message names it and says what to do instead.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Of the update along the estimated gradient."})
    optim: str = field(default="sgd", metadata={"help": "Always sgd; choose by --method."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Always 0: there is no gradient to clip."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not needed: the loss of a refused step is left out of the logs without it."}
    )

    method: Literal["mezo", "sparse-mezo", "lezo", "mezo-svrg"] = field(
        default="mezo", metadata={"help": "The zeroth-order method."}
    )
    eps: float = field(default=1e-3, metadata={"help": "Scale of the perturbation."})
    directions: int = field(default=1, metadata={"help": "Directions a step; each costs two evaluations."})
    sparsity: float | None = field(
        default=None,
        metadata={"help": "Fraction of each tensor left alone, by magnitude (default 0.75 for sparse-mezo, else 0)."},
    )
    drop: float | None = field(
        default=None,
        metadata={"help": "Fraction of transformer blocks left alone in a step (default 0.75 for lezo, else 0)."},
    )
    anchor_every: int | None = field(
        default=None, metadata={"help": "mezo-svrg: steps from one anchor to the next (default 5)."}
    )
    anchor_lr: float | None = field(
        default=None,
        metadata={"help": "mezo-svrg: learning rate at an anchor, scheduled as the other (default twice that)."},
    )
    anchor_examples: int | None = field(
        default=None,
        metadata={"help": "mezo-svrg: training examples that stand for all at an anchor (default 128)."},
    )
    perturb: Literal["auto", "in_place", "in_forward"] = field(
        default="auto",
        metadata={"help": "Where: the weights in place, or copies of them in the forward (auto: for 16-bit weights)."},
    )
    rounding: Literal["auto", "nearest", "stochastic"] = field(
        default="auto", metadata={"help": "Of updates of 16-bit weights (auto: stochastic)."}
    )
    offload: bool = field(
        default=False,
        metadata={"help": "Keep the weights in the CPU's memory; each module's are copied to the GPU when it runs."},
    )
    zo_seed: int | None = field(default=None, metadata={"help": "Of the noise (default: that of --seed)."})
    objective: Literal["loss", "accuracy"] = field(
        default="loss", metadata={"help": "What is minimised: the loss, or 1 - accuracy, which has no gradient."}
    )
    backend: str | None = field(default=None, metadata={"help": "Of the passes over the weights (default: by device)."})
    parallel: Literal["auto", "batch", "directions", "off"] = field(
        default="auto", metadata={"help": "What the processes of torchrun share out (auto: the batch)."}
    )
    parallel_check_every: int | None = field(
        default=None,
        metadata={"help": "Steps after which the processes compare their weights, 0 for never (default 100)."},
    )

    def __post_init__(self) -> None:
        self._refuse_what_has_no_meaning()
        for name, allowed in (
            ("method", METHODS),
            ("perturb", PERTURB),
            ("rounding", ("auto", *ROUNDINGS)),
            ("objective", OBJECTIVES),
            ("parallel", SPLITS),
        ):
            checks.choice(name, getattr(self, name), allowed)
        checks.number("eps", self.eps, 0.0, open_low=True)
        checks.integer("directions", self.directions, 1, MAX_DIRECTIONS)
        for name in ("sparsity", "drop"):
            self._check(name, checks.number, 0.0, 1.0, open_high=True)
        self._check("anchor_lr", checks.number, 0.0)
        for name in ("anchor_every", "anchor_examples"):
            self._check(name, checks.integer, 1)
        self._check("parallel_check_every", checks.integer, 0)
        self._check("zo_seed", checks.integer, 0, checks.MAX_SEED)
        for name in _ANCHOR:
            if self.method != "mezo-svrg" and getattr(self, name) is not None:
                raise ValueError(f"{name}: expected method='mezo-svrg', which alone has anchors, got {self.method!r}")
        if self.parallel == "directions":  # a process compares losses of its own batch alone
            self.average_tokens_across_devices = False
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """As `TrainingArguments`; a CPU without the number that accelerate gives it where there are several processes.

        To one with a number `torch.load` restores nothing, and Trainers of earlier versions ask it to.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def place_model_on_device(self) -> bool | None:
        """As `TrainingArguments`; not if the weights are to stay in the CPU's memory."""
        return False if self.offload else super().place_model_on_device

    def _refuse_what_has_no_meaning(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            # What is off may be said: many scripts do.
            if known.name in _WITHOUT_MEANING and value != known.default and value not in (None, False, "", []):
                raise ValueError(
                    f"{known.name}: expected {known.default!r}, got {value!r}: {_WITHOUT_MEANING[known.name]}"
                )

    def _check(self, name: str, check: Any, *bounds: float, **open_ends: bool) -> None:
        """What was left to its default is None."""
        if getattr(self, name) is not None:
            check(name, getattr(self, name), *bounds, **open_ends)
