"""Evaluate the losses of a step: modules in evaluation mode, tokens counted once, sums in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module, asked: nn.Module | None = None) -> Iterator[None]:
    """Switch dropout off, so that all losses of a step see the same network. Afterwards every module is as before.

    Forwards see `training` False. Code around them, such as a `compute_loss` that files metrics by `model.training`,
    still sees True.

    Args:
        model: the model that `compute_loss` gets.
        asked: the Trainer's own model, if `model` was made from it by torch.compile.
    """
    outermost = {id(m): m for m in (model, asked) if m is not None}
    training = [m for m in model.modules() if m.training]
    before = [(m, m.training) for m in outermost.values()]
    for module in training:
        _set(module, False)
    try:
        with ExitStack() as forwards:
            if not any(is_compiled_in_place(m) for m in outermost.values()):
                for module in outermost.values():
                    # torch.compile's forward is the other's, and it would be compiled anew with another around it.
                    if module is model or not hasattr(model, "_orig_mod"):
                        forwards.enter_context(_told_apart(module, list(outermost.values())))
                for module in outermost.values():
                    module.training = True
            yield
    finally:
        for module in training:
            _set(module, True)
        for module, was in before:
            module.training = was


def _set(module: nn.Module, training: bool) -> None:
    """`module.training = training`, ten times as fast as through the module's own `__setattr__`."""
    own = vars(module)
    if "training" in own:
        own["training"] = training
    else:  # a property of compiled modules
        module.training = training


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, which also compiles what is around the forward."""
    return getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _told_apart(module: nn.Module, outermost: list[nn.Module]) -> Iterator[None]:
    """While the module's forward, or another of its methods that reads `training`, runs, `outermost` are not training.

    Hooks would not do: `module.forward(...)` bypasses them.
    """
    own: dict[str, Any] = vars(module)
    kind: Any = type(module)
    names = ["forward", *_asking(kind)]
    lent = {name: own[name] for name in names if name in own}  # such as accelerate's
    own |= {name: MethodType(_evaluated(getattr(module, name), module, outermost), module) for name in names}
    try:
        yield
    finally:
        for name in names:
            if name in lent:
                own[name] = lent[name]
            else:
                del own[name]


@functools.cache
def _asking(kind: Any) -> list[str]:
    """Methods of the model's own code, besides its forward, that read `training`."""
    every = {name: f for c in reversed(kind.__mro__) for name, f in vars(c).items() if isinstance(f, FunctionType)}
    ours = [name for name, f in every.items() if not name.startswith("__") and name != "forward"]
    libraries = ("torch", "transformers", "peft")
    own = [name for name in ours if every[name].__module__.partition(".")[0] not in libraries]
    return [name for name in own if "training" in every[name].__code__.co_names]


def _evaluated(method: Any, module: nn.Module, outermost: list[nn.Module]) -> Any:
    """A method that runs with `outermost` in evaluation mode."""
    plain = getattr(method, "__func__", None)

    @functools.wraps(method if plain is None else plain)
    def evaluated(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        if self is not module and plain is not None:  # a copy that `compute_loss` has made
            return plain(self, *inputs, **options)
        before = [m.training for m in outermost]
        for m in outermost:
            m.training = False
        try:
            return method(*inputs, **options)
        finally:
            for m, was in zip(outermost, before, strict=True):
                m.training = was

    return evaluated


def counted_once(trainer: Any, closures: Sequence[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
    """Let the closures of a step count the tokens of its batches only once, for trainers of TRL, which count them."""
    first, *others = closures
    if not hasattr(trainer, "_total_train_tokens"):
        return [first, *others]
    before = trainer._total_train_tokens

    def evaluated() -> Tensor:
        trainer._total_train_tokens = before
        return first()

    def uncounted(closure: Callable[[], Tensor]) -> Tensor:
        counted = trainer._total_train_tokens
        try:
            return closure()
        finally:
            trainer._total_train_tokens = counted

    return [evaluated, *(functools.partial(uncounted, closure) for closure in others)]


def float64(value: Any, device: torch.device) -> Tensor:
    """A number or a tensor of one element as a float64 scalar on the device. The optimizer checks if it is finite.

    Raises ValueError if it has more elements.
    """
    result = torch.as_tensor(value, device=device).detach()
    if result.numel() != 1:
        raise ValueError(f"compute_loss: expected a scalar, got a tensor of shape {tuple(result.shape)}")
    return result.reshape(()).to(torch.float64)
