"""Whether the two losses of a direction are of the same network: dropout and the like draw anew in each evaluation.

Modules tell what they would do; that they did it, and not alike both times, is told by PyTorch's random generators: a
closure that sets their seed leaves them in the same state each time, and one that draws nothing leaves them alone. What
a closure draws by itself, such as its batch, is told by another loss at the same weights.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..names import listed
from ..warn import Warner

_ACTIVE = "dropout"  # what is said is about
_STATISTICS = "batch normalisation"
_DRAWN = "drawn anew"
_SAME = 1e-4  # of a loss: a GPU may add in another order


class Randomness:
    """Looks at the modules that may be active. All of them are gone through only now and then; in every step no more
    than what has become of those that matter. Modes are those after a call: closures may set them.
    """

    def __init__(self, warner: Warner, module: nn.Module | None):
        self._warner, self._module = warner, module
        self._drawing: list[tuple[str, nn.Module]] = []
        self._keeping: list[tuple[str, nn.Module]] = []

    def begin(self, due: bool) -> None:
        """Before a step.

        Args:
            due: look at every module.
        """
        if due and self._module is not None:
            self._drawing, self._keeping = draws_in_training(self._module), _keeps_statistics(self._module)

    def may_draw(self) -> bool:
        """Whether a module would draw, as the modes are now: then `called` tells what it did."""
        return any(m.training for _, m in self._drawing)

    def called(self) -> Callable[[], None] | None:
        """What is to be called after each of the evaluations that are next; None if there is nothing to see. It raises
        ValueError where `Warner` does.
        """
        drawing = [] if self._warner.warned(_ACTIVE) else self._drawing
        keeping = [] if self._warner.warned(_STATISTICS) else self._keeping
        if not drawing and not keeping:
            return None
        counts, states, calls = _counts(keeping), list[list[Tensor]](), count()

        def look() -> None:
            if (call := next(calls)) > 1:
                return
            if _counts(keeping) != counts:
                now = zip(keeping, counts, _counts(keeping), strict=True)
                self._warner.warn(_STATISTICS, _told_of_statistics(_named([m for m, a, b in now if a != b])))
            if any(m.training for _, m in drawing):
                states.append(_generators())
                if call == 1 and len(states) == 2 and not all(map(torch.equal, *states)):
                    self._warner.warn(_ACTIVE, _told_of_drawing(_named([each for each in drawing if each[1].training])))

        return look


def _counts(keeping: Sequence[tuple[str, nn.Module]]) -> list[int]:
    """How often they have counted a batch, or changed a mean."""
    return [m.num_batches_tracked._version + m.running_mean._version for _, m in keeping]


class Draws:
    """Whether a closure draws a batch, or noise, in each call anew: it is called once more, if a generator moved."""

    def __init__(self, warner: Warner):
        self._warner = warner
        self._due = False

    def begin(self, due: bool) -> None:
        """Before a step; `due` to look at the first call that is next."""
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._due |= due and not ranks  # others might wait for one that calls again

    def call(self, closure: Callable[[], Any], known: Callable[[], bool]) -> Any:
        """What the closure returns.

        Args:
            known: whether a module may have drawn, as the modes are then, which is told elsewhere.

        Raises:
            ValueError: see `Warner`.
        """
        if not self._due or self._warner.warned(_DRAWN):
            return closure()
        self._due = False
        before = _all_generators()
        loss = closure()
        scalar = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, (int, float))
        if not scalar or known() or _all_generators() == before:
            return loss
        first, again = float(loss), float(closure())
        if abs(first - again) > _SAME * abs(first):
            self._warner.warn(
                _DRAWN,
                f"closure: it returned {first:.6g} and then {again:.6g} at the same weights, and drew random numbers: "
                "a batch, or noise, that is another one in each call, so that L+ and L- are of two problems, and g "
                "mostly their difference; draw the batch before the step, or set the generator's seed in the closure",
            )
        return loss


def _all_generators() -> list[Any]:
    """Of PyTorch, Python and NumPy, as what can be compared."""
    numpy: Any = sys.modules.get("numpy")
    others = [] if numpy is None else [[str(part) for part in numpy.random.get_state()]]
    return [*(state.tolist() for state in _generators()), random.getstate(), *others]


def _generators() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def draws_in_training(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that draw random numbers if they are in training mode, as far as they tell it: by their class, by an
    attribute such as `attention_dropout`, or by a forward that calls a dropout of which they have no attribute.
    """
    return [(name, m) for name, m in module.named_modules() if _draws(m)]


def _draws(m: nn.Module) -> bool:
    if isinstance(m, torch.jit.ScriptModule):  # it has no code of Python to look at
        return False
    if isinstance(m, nn.modules.dropout._DropoutNd):
        return m.p > 0
    if isinstance(m, nn.RReLU):
        return m.lower < m.upper
    attributes = [value for key, value in vars(m).items() if "drop" in key]
    if attributes or any("drop" in key for key, _ in m.named_children()):
        return any(isinstance(p, float) and p > 0 for p in attributes)
    kind: Any = type(m)
    return _says_dropout(kind)


@cache
def _says_dropout(kind: type[nn.Module]) -> bool:
    """Whether its forward calls a dropout, or another method of one's own, which may be called in its place."""
    own = [vars(c) for c in kind.__mro__ if c.__module__.partition(".")[0] not in ("torch", "transformers", "peft")]
    methods = [kind.forward, *(f for each in own for f in each.values() if callable(f))]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in methods]
    return any("dropout" in name for code in codes if code is not None for name in code.co_names)


def _keeps_statistics(module: nn.Module) -> list[tuple[str, nn.Module]]:
    norm = nn.modules.batchnorm._NormBase
    return [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, norm) and m.num_batches_tracked is not None and m.momentum != 0.0
    ]


def _named(modules: Sequence[tuple[str, nn.Module]]) -> list[str]:
    return [f"{name or 'the module'} ({type(m).__name__})" for name, m in modules]


def _told_of_drawing(names: list[str]) -> str:
    return (
        f"closure: {listed(names, 3)} in training mode: other random numbers were drawn for L+ than for L-, which are "
        "losses of two networks then, and g is mostly their difference; call model.eval() before the step, or set the "
        "generator's seed in the closure (torch.manual_seed), so that it draws the same each time"
    )


def _told_of_statistics(names: list[str]) -> str:
    return (
        f"closure: {listed(names, 3)} in training mode: running statistics are updated in every evaluation, at "
        "perturbed weights; call model.eval() before the step, or eval() of these modules"
    )
