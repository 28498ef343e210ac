"""Our optimizers as the Trainer makes, holds and schedules them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import zo_kernels as zo
from zo_kernels.integrations.transformers.arguments import ZOTrainingArguments

DEFAULT_ANCHOR_EXAMPLES = 128


def make_optimizer(model: nn.Module, args: ZOTrainingArguments) -> zo.ZeroOrderOptimizer:
    """The optimizer that the arguments describe, of the model's parameters that require grad.

    Raises TypeError or ValueError as the optimizers do, and if what was asked for needs modules that run one by one.
    """
    options: dict[str, Any] = {
        "lr": args.learning_rate,
        "eps": args.eps,
        "weight_decay": args.weight_decay,
        "seed": args.seed if args.zo_seed is None else args.zo_seed,
        "directions": args.directions,
        "perturb": args.perturb,
        "rounding": args.rounding,
        "backend": args.backend,
        "parallel": args.parallel,
        "execution_device": args.device if args.offload else None,
    }
    if args.parallel_check_every is not None:
        options["parallel"] = zo.Parallel(args.parallel, check_every=args.parallel_check_every)
    for name in ("sparsity", "drop", "anchor_every", "anchor_lr"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    methods = {"mezo": zo.MeZO, "sparse-mezo": zo.SparseMeZO, "lezo": zo.LeZO, "mezo-svrg": zo.MeZOSVRG}
    optimizer = methods[args.method](model, **options)
    if args.torch_compile and optimizer.perturb == "in_forward":
        raise ValueError(
            "torch_compile: expected False, since weights are perturbed in the forward, module by module, and a "
            "compiled model runs no module by itself; set perturb='in_place' (with float32 weights), or leave "
            "torch_compile out"
        )
    return optimizer


class SteppedInTrainingStep(AcceleratedOptimizer):
    """An optimizer as the Trainer holds it: the Trainer's own `step()`, after each training step, does nothing.

    `ZOTrainer.training_step` has taken the step by then, since the step is what evaluates the loss.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer, device_placement=False)

    def step(self, closure: Any = None) -> None:
        """Nothing."""


def schedule_anchor_rates(optimizer: zo.ZeroOrderOptimizer) -> None:
    """Have MeZO-SVRG's `anchor_lr`, if it is a number, follow the schedule of `lr`, all that a scheduler changes."""
    for group in optimizer.param_groups:
        if group.get("anchor_lr") is not None:
            # In the group, so that a checkpoint holds it.
            lr, anchor_lr = group.setdefault(
                "unscheduled_rates", (group.get("initial_lr", group["lr"]), group["anchor_lr"])
            )
            if lr:
                group["anchor_lr"] = anchor_lr * (group["lr"] / lr)
