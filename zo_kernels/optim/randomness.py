"""Whether the two losses of a direction are of the same network: dropout and the like draw anew in each evaluation.

Modules tell what they would do; that they did it, and not alike both times, is told by PyTorch's random generators: a
closure that sets their seed leaves them in the same state each time, and one that draws nothing leaves them alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from .warned import Doubts

_ACTIVE = "dropout"  # what is said is about
_STATISTICS = "batch normalisation"


class Randomness:
    """Looks at the modules that may be active. All of them are gone through only now and then; in every step no more
    than whether the mode has changed of those that matter.
    """

    def __init__(self, doubts: Doubts, module: nn.Module | None):
        self._doubts, self._module = doubts, module
        self._matter: list[nn.Module] = []
        self._training = 0  # of these, in the last step
        self._drawing = False

    def begin(self, due: bool) -> None:
        """Before a step.

        Args:
            due: look at every module.

        Raises:
            ValueError: see `Doubts`.
        """
        self._drawing = False
        if self._module is None or (self._doubts.heard(_ACTIVE) and self._doubts.heard(_STATISTICS)):
            return
        training = sum([m.training for m in self._matter])
        if due or training != self._training:
            drawing, keeping = draws_in_training(self._module), _keeps_statistics(self._module)
            self._matter = [m for _, m in [*drawing, *keeping]]
            training = sum([m.training for m in self._matter])
            self._training = -1  # look again, should this raise
            if names := _active(keeping):
                self._doubts.say(_STATISTICS, _told_of_statistics(names))
            self._drawing = bool(_active(drawing))
        self._training = training

    def called(self) -> Callable[[], None] | None:
        """What is to be called after each of the evaluations that are next; None if there is nothing to see. It raises
        ValueError where `Doubts` does.
        """
        if not self._drawing or (module := self._module) is None or self._doubts.heard(_ACTIVE):
            return None
        before: list[list[torch.Tensor]] = []

        def look() -> None:
            if len(before) < 2:
                before.append(_generators())
                if len(before) == 2 and not all(map(torch.equal, *before)):
                    self._training = -1  # look again, should this raise
                    self._doubts.say(_ACTIVE, _told_of_drawing(_active(draws_in_training(module))))

        return look


def _generators() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def draws_in_training(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that draw random numbers if they are in training mode, as far as they tell it: by their class, by an
    attribute such as `attention_dropout`, or by a forward that calls a dropout of which they have no attribute.
    """
    return [(name, m) for name, m in module.named_modules() if _draws(m)]


def _draws(m: nn.Module) -> bool:
    if isinstance(m, nn.modules.dropout._DropoutNd):
        return m.p > 0
    if isinstance(m, nn.RReLU):
        return m.lower < m.upper
    attributes = [value for key, value in vars(m).items() if "drop" in key]
    if attributes or any("drop" in key for key in m._modules):
        return any(isinstance(p, float) and p > 0 for p in attributes)
    code = getattr(inspect.unwrap(type(m).forward), "__code__", None)
    return code is not None and any("dropout" in name for name in code.co_names)


def _keeps_statistics(module: nn.Module) -> list[tuple[str, nn.Module]]:
    norm = nn.modules.batchnorm._NormBase
    return [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, norm) and m.track_running_stats and m.running_mean is not None
    ]


def _active(modules: list[tuple[str, nn.Module]]) -> list[str]:
    """What to call those that are in training mode."""
    return [f"{name or 'the module'} ({type(m).__name__})" for name, m in modules if m.training]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _told_of_drawing(names: list[str]) -> str:
    return (
        f"closure: {_some(names)} in training mode: other random numbers were drawn for L+ than for L-, which are "
        "losses of two networks then, and g is mostly their difference; call model.eval() before the step, or set the "
        "generator's seed in the closure (torch.manual_seed), so that it draws the same each time"
    )


def _told_of_statistics(names: list[str]) -> str:
    return (
        f"closure: {_some(names)} in training mode: running statistics are updated in every evaluation, at perturbed "
        "weights; call model.eval() before the step, or eval() of these modules"
    )
