"""Make the optimizer of a ZOTrainer, wrap it for the Trainer, and schedule its learning rates."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import zo_kernels as zo
from zo_kernels.integrations.transformers.arguments import ZOTrainingArguments
from zo_kernels.warn import warn

DEFAULT_ANCHOR_EXAMPLES = 128
DEFAULT_RATE = 1e-6  # of ZOTrainingArguments
_CLASSES: dict[str, type[zo.ZeroOrderOptimizer]] = {
    "mezo": zo.MeZO, "sparse-mezo": zo.SparseMeZO, "lezo": zo.LeZO, "mezo-svrg": zo.MeZOSVRG, "fzoo": zo.FZOO,
}  # fmt: skip


def make_optimizer(model: nn.Module, args: ZOTrainingArguments, *, lr: float | None = None) -> zo.ZeroOrderOptimizer:
    """Make the optimizer that the arguments describe, for the model's parameters that require grad.

    Args:
        lr: in place of `args.learning_rate`.

    Raises TypeError or ValueError as the optimizers do, and if torch_compile is combined with in-forward perturbation.
    """
    options: dict[str, Any] = {
        "lr": args.learning_rate if lr is None else lr,
        "eps": args.eps,
        "weight_decay": args.weight_decay,
        "seed": args.seed if args.zo_seed is None else args.zo_seed,
        "perturb": args.perturb,
        "rounding": args.rounding,
        "backend": args.backend,
        "parallel": args.parallel,
        "execution_device": args.device if args.offload else None,
    }
    if args.parallel_check_every is not None:
        options["parallel"] = zo.Parallel(args.parallel, check_every=args.parallel_check_every)
    for name in (
        "directions", "distribution", "estimator", "normalize", "sparsity", "mask", "drop", "anchor_every", "anchor_lr",
        "anneal", "anneal_above",
    ):  # fmt: skip
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    optimizer = _CLASSES[args.method](model, **options)
    if lr is None and optimizer.normalize != "none" and args.learning_rate == DEFAULT_RATE:
        warn(
            f"learning_rate: the default of {DEFAULT_RATE:g} is for 'mezo'; with normalize={optimizer.normalize!r} "
            "rates are in units of the weights, 5e-3 to begin with: set it, or take trainer.find_lr().lr"
        )
    if args.torch_compile and optimizer.perturb == "in_forward":
        raise ValueError(
            "torch_compile: expected False, since weights are perturbed in the forward, module by module, but a "
            "compiled model does not run its modules one by one; set perturb='in_place' (with float32 weights), or "
            "leave torch_compile out"
        )
    return optimizer


class SteppedInTrainingStep(AcceleratedOptimizer):
    """The wrapper through which the Trainer holds the optimizer. Its `step()` does nothing.

    `ZOTrainer.training_step` has already taken the step, since the step itself evaluates the loss.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer, device_placement=False)

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


def schedule_anchor_rates(optimizer: zo.ZeroOrderOptimizer) -> None:
    """Let MeZO-SVRG's `anchor_lr`, if set, follow the schedule of `lr`, since schedulers change only `lr`."""
    for group in optimizer.param_groups:
        if group.get("anchor_lr") is not None:
            # Kept in the group, so that a checkpoint holds it.
            lr, anchor_lr = group.setdefault(
                "unscheduled_rates", (group.get("initial_lr", group["lr"]), group["anchor_lr"])
            )
            if lr:
                group["anchor_lr"] = anchor_lr * (group["lr"] / lr)
