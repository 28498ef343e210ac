"""How each peer is run: a peer's own code makes the step; its adapter gives it the model, the loss, lr and ε.

An adapter imitates nothing: code that cannot run here raises `Unavailable`.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import zo_kernels as zo

from ..bench.timing import Watch
from ..kernels.baselines import published_pass
from ..step.baseline_steps import Baseline
from ..step.exact import wrong_step as wrong_bits
from .check import Loss, Settings, Step, wrong_step
from .checkout import bare_package, commit, methods

_STRIDE = 1_000_003  # between the first seeds of two runs, for peers that take a seed in each step


@dataclass(frozen=True)
class Peer:
    """A package, ready to run.

    Args:
        title: in tables and figures.
        make: makes a step on the model, which calls the loss; each one starts from the beginning.
        seeded_by: how a user chooses the noise; None if no one can.
        version: or commit.
        how: which of its code runs, and what stands in for code that cannot run here.
        check: takes a step, and says how it differs from a step of SPSA.
    """

    title: str
    make: Callable[[nn.Module, Loss, Settings], Step]
    seeded_by: str | None
    version: str | None = None
    how: str | None = None
    check: Callable[[Step, Loss, Settings], str | None] = wrong_step


def ours(perturb: str) -> Peer:
    """zo_kernels itself: MeZO, in place or in the forward, checked to the last bit of the noise's specification."""
    # In the forward, steps that still look for weights read elsewhere are slower than the thousands after them.
    title, slow_steps = {"in_place": ("zo_kernels", 0), "in_forward": ("zo_kernels, in the forward", 17)}[perturb]

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        optimizer = zo.MeZO(model, lr=settings.lr, eps=settings.eps, seed=settings.seed, perturb=perturb)
        return partial(optimizer.step, loss)

    def check(step: Any, loss: Loss, settings: Settings) -> str | None:
        optimizer = step.func.__self__
        wrong = wrong_bits(optimizer, loss.model, loss)
        while wrong is None and optimizer.step_count < slow_steps:
            step()
        return wrong

    return Peer(title, make, "seed=", zo.__version__, check=check)


def published() -> Peer:
    """MeZO's algorithm as published (Malladi et al., arXiv 2305.17333): four passes over the weights, each with a fresh
    `torch.normal` for each parameter, and one seed a step.
    """

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        params = list(model.parameters())
        unread, no_masks = Watch(params[0].device), [None] * len(params)
        seed = settings.seed * _STRIDE
        own = Baseline(params, published_pass, False, loss, unread, settings.eps, settings.lr, no_masks, seed=seed)

        def step() -> None:
            own.spsa()
            unread.clear()

        return step

    return Peer("MeZO's loop", make, "a seed each step", how="restated, not its code")


def _trainer_step(own: Any, model: nn.Module, loss: Loss, settings: Settings, **arguments: object) -> Step:
    """A step of a trainer of transformers 4.28; `own` has only its methods of MeZO, and here gets what they read."""
    own.args = SimpleNamespace(zo_eps=settings.eps, non_diff=False, n_gpu=1, gradient_accumulation_steps=1, **arguments)
    own._prepare_inputs = lambda inputs: inputs
    own.compute_loss_context_manager = nullcontext
    own.compute_loss = lambda model, inputs: loss()
    own.lr_scheduler = SimpleNamespace(step=lambda: None)
    np.random.seed(settings.seed)

    def step() -> None:
        own.zo_step(model, None)
        own.zo_update(model)

    return step


def mezo(path: Path) -> Peer:
    """MeZO's own trainer."""
    names = ("zo_perturb_parameters", "zo_forward", "zo_step", "zo_update")
    trainer = methods(path / "large_models" / "trainer.py", "OurTrainer", names, {"torch": torch, "np": np})

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = trainer()
        own._get_learning_rate = lambda: settings.lr
        return _trainer_step(own, model, loss, settings, weight_decay=0.0)

    how = f"{', '.join(names)} of OurTrainer; the rest of its module needs transformers 4"
    return Peer("MeZO", make, "numpy.random.seed", commit(path), how)


def zo_llm(path: Path) -> Peer:
    """ZO-LLM (ZO-Bench, arXiv 2402.11592): the ZO-SGD of its trainer."""
    names = ("zo_perturb_parameters", "zo_forward", "get_grad_sparsity_by_name", "zo_step", "zo_update")
    trainer = methods(path / "zo-bench" / "trainer.py", "OurTrainer", names, {"torch": torch, "np": np})

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = trainer()
        own.gradient_sparsity = None
        own.sparse_grad_rng, own.sparse_grad_random_seed = torch.Generator(), 0
        own.optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.0)
        return _trainer_step(own, model, loss, settings, trainer="zo_sgd", q=1, perturbation_mode="two_side")

    how = f"{', '.join(names)} of OurTrainer, without sparsity; the rest of its module needs transformers 4"
    return Peer("ZO-LLM", make, "numpy.random.seed", commit(path), how)


def mezo_svrg(path: Path) -> Peer:
    """mezo_svrg (arXiv 2404.08080): the MeZO step of its Lightning module.

    Its MeZO-SVRG step does not run: it draws seeds as arrays of one element, which NumPy 2.4 does not convert.
    """
    names = ("efficient_perturb_parameters", "zo_forward_memory_eff", "training_step_ZO")
    given = {"torch": torch, "np": np, "math": math, "time": time}
    module = methods(path / "models" / "llm_module.py", "GLUETransformer", names, given)

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        class Evaluated:  # its forward calls this, and takes the first output
            eval = model.eval

            def __call__(self, **inputs: Any) -> tuple[Tensor]:
                return (loss(),)

        own = module()
        own.model, own.params = model, list(model.named_parameters())
        own.zero_order_eps, own.learning_rate, own.z_std = settings.eps, settings.lr, 1.0
        own.batchsize_limit = 1
        own.time, own.query = [], []
        own.log_training_loss = lambda *_, **__: None
        own.measure_memory_usage = lambda: None
        np.random.seed(settings.seed)
        return partial(own.training_step_ZO, Evaluated(), {"input_ids": torch.zeros(1, 1)})

    how = (
        f"{', '.join(names)} of GLUETransformer, without its logging (a third forward a step); "
        "the rest of its module needs pytorch_lightning"
    )
    return Peer("mezo_svrg", make, "numpy.random.seed", commit(path), how)


def zo2(path: Path) -> Peer:
    """zo2 (arXiv 2503.12668): its MeZO-SGD on one device. Its offloading needs CUDA, its models transformers 4."""
    bare_package(path / "zo2")
    config = importlib.import_module("zo2.config.mezo_sgd").MeZOSGDConfig
    optimizer = importlib.import_module("zo2.optimizer.mezo_sgd.zo").MeZOSGD

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        own = optimizer(model, config(lr=settings.lr, eps=settings.eps, weight_decay=0.0, zo2=False))
        own.inner_zo_forward = torch.inference_mode()(lambda: loss())  # its models' optimizers define it
        seeds = count(settings.seed * _STRIDE)
        return lambda: own.zo_forward(zo_random_seed=next(seeds))

    how = "optimizer.mezo_sgd.zo.MeZOSGD; its models need transformers 4, its offloading CUDA"
    return Peer("zo2", make, "zo_random_seed=", commit(path), how)


def torchzero() -> Peer:
    """torchzero, from PyPI: its MeZO module with Gaussian noise, and a learning rate."""
    tz = importlib.import_module("torchzero")

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        # `return_approx_loss` saves a third forward; the module's default noise is Rademacher's.
        module = tz.m.MeZO(h=settings.eps, distribution="gaussian", return_approx_loss=True)
        optimizer = tz.Optimizer(model.parameters(), module, tz.m.LR(settings.lr))
        return partial(optimizer.step, lambda backward=True: loss())

    how = 'm.MeZO(distribution="gaussian", return_approx_loss=True), m.LR'
    return Peer("torchzero", make, None, version("torchzero"), how)


def zotitan() -> Peer:
    """zotitan, from PyPI: its ZOOptimizer with MeZO's settings. The Triton kernel that makes its noise needs a GPU."""
    train_zo = importlib.import_module("zotitan.train_zo")
    score = importlib.import_module("zotitan.objective").Score
    vars(train_zo)["_philox_randn"] = lambda seed, n, device: torch.randn(
        n, generator=torch.Generator(device).manual_seed(seed), device=device
    )

    def make(model: nn.Module, loss: Loss, settings: Settings) -> Step:
        config = train_zo.ZOConfig(base=train_zo.BaseTrainConfig(lr=settings.lr), eps=settings.eps)
        own = train_zo.ZOOptimizer(list(model.named_parameters()), config, lambda model, batch: score(loss(), {}))
        return partial(own.step, model, [{}])

    how = (
        "train_zo.ZOOptimizer; torch.randn, seeded for each parameter alike, in place of its kernel, which needs a GPU"
    )
    return Peer("zotitan (torch.randn)", make, None, version("zotitan"), how)


# Those of options.CHECKOUTS are loaded with a path.
PEERS: dict[str, Callable[..., Peer]] = {
    "ours": partial(ours, "in_place"),
    "ours-in-forward": partial(ours, "in_forward"),
    "published": published,
    "mezo": mezo,
    "zo2": zo2,
    "zo-llm": zo_llm,
    "mezo-svrg": mezo_svrg,
    "torchzero": torchzero,
    "zotitan-randn": zotitan,
}
