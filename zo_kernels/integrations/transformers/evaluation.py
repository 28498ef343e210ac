"""How the losses of a step are evaluated: without dropout, and summed in float64."""

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
    """Dropout off, so that all losses of a step see one network; afterwards every module is as it was.

    Code around the forward that asks `training`, of the model that it calls or of the Trainer's own, is told that this
    is training, as it is: by that, metrics are filed. The forward of either is told that it is not.

    Args:
        model: as `compute_loss` gets it.
        asked: the Trainer's own, of which `model` may be what torch.compile made.
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
    """As `module.training = training`, which takes a module ten times as long."""
    own = vars(module)
    if "training" in own:
        own["training"] = training
    else:  # of what torch.compile made it is a property
        module.training = training


def is_compiled_in_place(module: nn.Module) -> bool:
    """By `module.compile()`: all around its forward is compiled, too."""
    return getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _told_apart(module: nn.Module, outermost: list[nn.Module]) -> Iterator[None]:
    """While the module's forward runs, or another of its methods that asks, those are not training. Not by hooks, which
    `module.forward(...)` passes by.
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
    """Methods besides its forward that ask whether the module is training, and are the model's own."""
    every = {name: f for c in reversed(kind.__mro__) for name, f in vars(c).items() if isinstance(f, FunctionType)}
    ours = [name for name, f in every.items() if not name.startswith("__") and name != "forward"]
    libraries = ("torch", "transformers", "peft")
    own = [name for name in ours if every[name].__module__.partition(".")[0] not in libraries]
    return [name for name in own if "training" in every[name].__code__.co_names]


def _evaluated(method: Any, module: nn.Module, outermost: list[nn.Module]) -> Any:
    """What stands in for a method."""
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
    """The closures of a step, which count the tokens of its batches, as the trainers of TRL do, once between them."""
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
    """A number or a tensor of one element as a scalar on the device; whether it is finite is for the optimizer to see.

    Raises ValueError if it has more elements.
    """
    result = torch.as_tensor(value, device=device).detach()
    if result.numel() != 1:
        raise ValueError(f"compute_loss: expected a scalar, got a tensor of shape {tuple(result.shape)}")
    return result.reshape(()).to(torch.float64)
