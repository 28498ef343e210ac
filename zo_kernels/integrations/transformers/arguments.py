"""`TrainingArguments` with the options of zeroth-order training. Options that need a backward pass are refused."""

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
from zo_kernels.spec import DISTRIBUTIONS
from zo_kernels.trajectory.difference import DIFFERENCES
from zo_kernels.trajectory.setups import NORMALIZE

METHODS = ("mezo", "sparse-mezo", "lezo", "mezo-svrg", "fzoo")
_OWN_ESTIMATOR = {"fzoo": ("one_sided", "std"), "mezo-svrg": (None, None)}  # of methods that do not let one choose
OBJECTIVES = ("loss", "accuracy")
ESTIMATORS = tuple(DIFFERENCES)
_ANCHOR = ("anchor_every", "anchor_lr", "anchor_examples", "anneal", "anneal_above")
MASKS = ("redrawn", "kept")

_ADAM = "the update is plain SGD along the estimated gradient; choose it by method=, learning_rate= and weight_decay="
_NO_ACTIVATIONS = "without a backward pass no activations are kept, so there are none to recompute; leave it out"
_NO_DDP = "the model is not wrapped in DistributedDataParallel, since there are no gradients to reduce; leave it out"
_ONE_COPY = (
    "every process of torchrun holds the whole model, at the memory of inference; leave it out, and for a model larger "
    "than the GPU set offload=True, or shard it with fully_shard in a loop of your own"
)
# Options without meaning where there are no gradients: field -> the reason and what to do instead.
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


@dataclass(repr=False)  # the repr of TrainingArguments hides tokens
class ZOTrainingArguments(TrainingArguments):
    """The settings of a `ZOTrainer`: `TrainingArguments` and the options of the optimizers of zo_kernels.

    Four defaults differ from `TrainingArguments`: `learning_rate` is 1e-6; `max_grad_norm` is 0; `optim` is "sgd",
    since the update is plain SGD along the estimated gradient; `logging_nan_inf_filter` is False, since the loss of a
    refused step never reaches the logs. docs/trainer.md explains every option.

    Raises:
        TypeError, ValueError: an option is out of range, belongs to another method, or has no meaning without
            gradients; the message names it and says what to do instead.
    """

    learning_rate: float = field(
        default=1e-6, metadata={"help": "Learning rate of the update along the estimated gradient."}
    )
    optim: str = field(default="sgd", metadata={"help": "Always sgd; choose the optimizer by --method."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Always 0: there is no gradient to clip."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not needed: the loss of a refused step is left out of the logs without it."}
    )

    method: Literal["mezo", "sparse-mezo", "lezo", "mezo-svrg", "fzoo"] = field(
        default="mezo", metadata={"help": "The zeroth-order method."}
    )
    eps: float = field(default=1e-3, metadata={"help": "Scale of the perturbation."})
    directions: int | None = field(
        default=None,
        metadata={
            "help": "Random directions averaged in each step; each costs two evaluations of the loss, one-sided one "
            "(default 8 for fzoo, else 1)."
        },
    )
    estimator: Literal["two_sided", "one_sided"] | None = field(
        default=None,
        metadata={
            "help": "Losses on both sides of the weights, or on one side and at the weights (default one_sided for "
            "fzoo, else two_sided)."
        },
    )
    normalize: Literal["none", "std", "rms"] | None = field(
        default=None,
        metadata={
            "help": "What the learning rate is divided by: nothing, the deviation of the projected gradients over the "
            "directions of a step, or their running root mean square (default std for fzoo, else none)."
        },
    )
    sparsity: float | None = field(
        default=None,
        metadata={"help": "Fraction of each tensor that stays unchanged (default 0.75 for sparse-mezo, else 0)."},
    )
    drop: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of transformer blocks that a step leaves unchanged (default 0.75 for lezo, else 0)."
        },
    )
    mask: Literal["redrawn", "kept"] | None = field(
        default=None,
        metadata={
            "help": "With sparsity: which weights take part is decided in each step (redrawn, the default), or once."
        },
    )
    anchor_every: int | None = field(
        default=None, metadata={"help": "mezo-svrg: steps from one anchor to the next (default 5)."}
    )
    anchor_lr: float | None = field(
        default=None,
        metadata={"help": "mezo-svrg: learning rate of the steps at an anchor (default twice learning_rate)."},
    )
    anchor_examples: int | None = field(
        default=None,
        metadata={"help": "mezo-svrg: training examples that estimate the full loss at an anchor (default 128)."},
    )
    anneal: float | None = field(
        default=None,
        metadata={
            "help": "mezo-svrg: divide all learning rates by this when the loss at an anchor is more than anneal_above "
            "times that at the anchor before (default: never)."
        },
    )
    anneal_above: float | None = field(
        default=None, metadata={"help": "mezo-svrg: the ratio of losses for anneal (default 1.05)."}
    )
    perturb: Literal["auto", "in_place", "in_forward"] = field(
        default="auto",
        metadata={
            "help": "Where to perturb: the weights in place, or copies in the forward (auto: in_forward for 16 bits)."
        },
    )
    rounding: Literal["auto", "nearest", "stochastic"] = field(
        default="auto", metadata={"help": "How updates of 16-bit weights are rounded (auto: stochastic)."}
    )
    distribution: Literal["normal", "rademacher"] | None = field(
        default=None,
        metadata={
            "help": "Of the noise: normal, or rademacher, which is random signs and makes passes faster (default "
            "rademacher for fzoo, else normal)."
        },
    )
    offload: bool = field(
        default=False,
        metadata={"help": "Keep the weights in CPU memory, and copy those of each module to the GPU when it runs."},
    )
    zo_seed: int | None = field(default=None, metadata={"help": "Seed of the noise (default: --seed)."})
    objective: Literal["loss", "accuracy"] = field(
        default="loss", metadata={"help": "What to minimise: the loss, or 1 - accuracy, which has no gradient."}
    )
    backend: str | None = field(default=None, metadata={"help": "Kernels to use (default: chosen by the device)."})
    parallel: Literal["auto", "batch", "directions", "off"] = field(
        default="auto", metadata={"help": "What the processes of torchrun divide among themselves (auto: the batch)."}
    )
    parallel_check_every: int | None = field(
        default=None,
        metadata={"help": "Steps between comparisons of the processes' weights, 0 for never (default 100)."},
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
        for name, several in (
            ("distribution", DISTRIBUTIONS), ("estimator", ESTIMATORS), ("normalize", NORMALIZE), ("mask", MASKS),
        ):  # fmt: skip
            self._check(name, checks.choice, several)
        self._check("anneal", checks.number, 1.0, open_low=True)
        self._check("anneal_above", checks.number, 1.0)
        if self.mask is not None and not (self.method == "sparse-mezo" if self.sparsity is None else self.sparsity):
            raise ValueError(f"mask: expected None without sparsity, got {self.mask!r}, which would have no effect")
        if self.anneal_above is not None and self.anneal is None:
            raise ValueError(f"anneal_above: expected None without anneal, got {self.anneal_above}")
        self._check("directions", checks.integer, 1, MAX_DIRECTIONS)
        for name, own in zip(("estimator", "normalize"), _OWN_ESTIMATOR.get(self.method, ()), strict=False):
            if getattr(self, name) not in (None, own):
                raise ValueError(
                    f"{name}: expected None with method={self.method!r}, which has its own, got {getattr(self, name)!r}"
                )
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
        if self.parallel == "directions":  # every process evaluates its own batch
            self.average_tokens_across_devices = False
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """As `TrainingArguments`, but a CPU has no index.

        accelerate gives it one with several processes. Trainers of earlier versions then cannot load checkpoints, since
        `torch.load` does not restore to a CPU with an index.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def place_model_on_device(self) -> bool | None:
        """As `TrainingArguments`, but False with `offload`, which keeps the weights in CPU memory."""
        return False if self.offload else super().place_model_on_device

    def _refuse_what_has_no_meaning(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            # Switching an option off is fine; many scripts do.
            if known.name in _WITHOUT_MEANING and value != known.default and value not in (None, False, "", []):
                raise ValueError(
                    f"{known.name}: expected {known.default!r}, got {value!r}: {_WITHOUT_MEANING[known.name]}"
                )

    def _check(self, name: str, check: Any, *bounds: Any, **open_ends: bool) -> None:
        """Check a field unless it is None, its default."""
        if getattr(self, name) is not None:
            check(name, getattr(self, name), *bounds, **open_ends)
