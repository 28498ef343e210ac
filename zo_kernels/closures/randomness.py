"""Checks that both losses of a direction come from the same network: dropout draws other numbers in each evaluation.

`Randomness` looks at the modules: which of them would draw, and which keep running statistics. Whether a module did
draw, and differently the second time, shows in the state of PyTorch's random generators: a closure that sets the seed
leaves the same state each time, and one that draws nothing leaves them unchanged. `Draws` looks at what the closure
itself draws, such as its batch: it calls the closure twice at the same weights and compares the losses.
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

# Topics of the reports.
_DROPOUT = "dropout"
_STATISTICS = "batch normalisation"
_DRAWN = "drawn anew"
_TOLERANCE = 1e-4  # relative; a GPU may add in another order


class Randomness:
    """Watches modules that draw random numbers, or update running statistics, in training mode.

    All modules are searched only now and then; each step looks at those that were found. Their modes are read after a
    call of the closure, which may set them.

    Attributes:
        found: whether there are such modules.
    """

    found = False

    def __init__(self, warner: Warner, module: nn.Module | None):
        self._warner, self._module = warner, module
        self._drawing: list[tuple[str, nn.Module]] = []
        self._keeping: list[tuple[str, nn.Module]] = []

    def begin(self) -> None:
        """Begin a step, and search all modules again."""
        if self._module is not None:
            self._drawing, self._keeping = draws_in_training(self._module), _keeps_statistics(self._module)
            self.found = bool(self._drawing or self._keeping)

    def may_draw(self) -> bool:
        """Whether a module in training mode may have drawn; then the function from `called` judges it."""
        return any(m.training for _, m in self._drawing)

    def called(self) -> Callable[[], None] | None:
        """Return a function to call after each of the next evaluations, or None if nothing needs watching.

        It compares the first two evaluations, reports to `Warner`, and raises ValueError where that does.
        """
        drawing = [] if self._warner.warned(_DROPOUT) else self._drawing
        keeping = [] if self._warner.warned(_STATISTICS) else self._keeping
        if not drawing and not keeping:
            return None
        counts, states, calls = _counts(keeping), list[list[Tensor]](), count()

        def compare() -> None:
            if (call := next(calls)) > 1:
                return
            if _counts(keeping) != counts:
                now = zip(keeping, counts, _counts(keeping), strict=True)
                self._warner.warn(_STATISTICS, _statistics_message(_named([m for m, a, b in now if a != b])))
            if any(m.training for _, m in drawing):
                states.append(_generators())
                if call == 1 and len(states) == 2 and not all(map(torch.equal, *states)):
                    active = [each for each in drawing if each[1].training]
                    self._warner.warn(_DROPOUT, _dropout_message(_named(active)))

        return compare


def _counts(keeping: Sequence[tuple[str, nn.Module]]) -> list[int]:
    """How often each module has counted a batch or changed its mean."""
    return [m.num_batches_tracked._version + m.running_mean._version for _, m in keeping]


class Draws:
    """Finds closures that draw a new batch, or noise, in each call: calls them once more if a generator has moved.

    Attributes:
        due: whether to check the next call.
    """

    def __init__(self, warner: Warner):
        self._warner = warner
        self.due = False

    def begin(self) -> None:
        """Begin a step whose first call is to be checked."""
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.due |= not ranks  # a second call on this rank alone might deadlock

    def call(self, closure: Callable[[], Any], known: Callable[[], bool]) -> Any:
        """Call the closure and return its loss.

        Args:
            known: returns whether a module may have drawn; `Randomness` reports that.

        Raises:
            ValueError: see `Warner`.
        """
        self.due = False
        if self._warner.warned(_DRAWN):
            return closure()
        before = _all_generators()
        loss = closure()
        scalar = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, (int, float))
        if not scalar or known() or _all_generators() == before:
            return loss
        first, again = float(loss), float(closure())
        if abs(first - again) > _TOLERANCE * abs(first):
            self._warner.warn(
                _DRAWN,
                f"closure: it returned {first:.6g} and then {again:.6g} at the same weights, and drew random numbers: "
                "it draws a new batch, or noise, in each call, so the losses of a step belong to several problems, and "
                "g is mostly their difference; draw the batch before the step, or set the generator's seed in the "
                "closure",
            )
        return loss


def _all_generators() -> list[Any]:
    """The states of the random generators of PyTorch, Python and NumPy, in a form that == compares."""
    others, numpy = list[Any](), sys.modules.get("numpy")
    if numpy is not None:
        name, words, *rest = numpy.random.get_state()
        others = [name, words.tobytes(), *rest]
    return [*(state.tolist() for state in _generators()), random.getstate(), *others]


def _generators() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def draws_in_training(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the modules that draw random numbers in training mode.

    They are recognised by their class, by an attribute such as `attention_dropout`, or, without such an attribute, by
    code that calls a dropout.
    """
    return [(name, m) for name, m in module.named_modules() if _draws(m)]


def _draws(m: nn.Module) -> bool:
    if isinstance(m, torch.jit.ScriptModule):  # it has no Python code to search
        return False
    if isinstance(m, nn.modules.dropout._DropoutNd):
        return m.p > 0
    if isinstance(m, nn.RReLU):
        return m.lower < m.upper
    attributes = [value for key, value in vars(m).items() if "drop" in key]
    if attributes or any("drop" in key for key, _ in m.named_children()):
        return any(isinstance(p, float) and p > 0 for p in attributes)
    kind: Any = type(m)
    return _calls_dropout(kind)


@cache
def _calls_dropout(kind: type[nn.Module]) -> bool:
    """Whether the code of a class calls a dropout: in its forward, or in any other method that the user wrote."""
    own = [vars(c) for c in kind.__mro__ if c.__module__.partition(".")[0] not in ("torch", "transformers", "peft")]
    methods = [kind.forward, *(f for each in own for f in each.values() if callable(f))]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in methods]
    return any("dropout" in name for code in codes if code is not None for name in code.co_names)


def _keeps_statistics(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the batch normalisations that update running statistics in training mode."""
    norm = nn.modules.batchnorm._NormBase
    return [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, norm) and m.num_batches_tracked is not None and m.momentum != 0.0
    ]


def _named(modules: Sequence[tuple[str, nn.Module]]) -> list[str]:
    return [f"{name or 'the module'} ({type(m).__name__})" for name, m in modules]


def _dropout_message(names: list[str]) -> str:
    return (
        f"closure: {listed(names, 3)} in training mode: other random numbers were drawn for one loss of a step than "
        "for another, so they are losses of two networks, and g is mostly their difference; call model.eval() before "
        "the step, or set the generator's seed in the closure (torch.manual_seed), so that each call draws the same "
        "numbers"
    )


def _statistics_message(names: list[str]) -> str:
    return (
        f"closure: {listed(names, 3)} in training mode: running statistics are updated in every evaluation, at "
        "perturbed weights; call model.eval() before the step, or eval() on these modules"
    )
