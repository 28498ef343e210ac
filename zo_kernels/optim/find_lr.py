"""Finds a learning rate by short runs that differ in the rate alone."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..closures.losses import Closure, OutOfRange, check_closure
from ..interrupts import signals_held
from ..modes import inference_mode
from ..warn import warn
from ..weights.shards import local
from .base import ZeroOrderOptimizer
from .mezo import MeZO

StepClosures = Closure | tuple[Closure, ...]

_FIRST = 0.1  # the first rate changes the loss, to first order, by this fraction of it in a step
_RISE = 0.1  # a rate has diverged when the loss has risen by this fraction, on average over _WINDOW steps
_WINDOW = 5
_ENOUGH = 0.8  # of the largest gain: the smallest rate with so much is taken, since too large a rate costs more
_LAST_FACTORS = 3  # if no rate gains, rates down to the largest one that did not diverge / 2^3 are tried
_SAME = 1e-3  # relative; a GPU may add in another order, another batch has another loss
_LEAST_STEPS = 2 * _WINDOW
_STEPS = 8 * _WINDOW  # twenty do not see what rises after a hundred
_TRIES = 5  # to restore the weights, if exceptions come meanwhile


@dataclass(frozen=True, slots=True)
class TriedLR:
    """A short run of `find_lr`.

    Attributes:
        lr: its learning rate.
        losses: of its steps, as `step` returns them. A run that diverged has no more of them.
        gain: by how much they are below the losses of the same batches with lr = 0, on average over the second half of
            the steps; None if it diverged.
    """

    lr: float
    losses: tuple[float, ...]
    gain: float | None


@dataclass(frozen=True, slots=True)
class FoundLR:
    """What `find_lr` found.

    Attributes:
        lr: the learning rate.
        learned: whether it lowered the loss. If no rate did so, `lr` is a quarter of the largest that did not diverge.
        tried: the rates that were tried, in order of size.
        baseline: the losses of the same steps with lr = 0.
        forwards: the price: how often closures were called, on this rank.
    """

    lr: float
    learned: bool
    tried: tuple[TriedLR, ...]
    baseline: tuple[float, ...]
    forwards: int

    @property
    def steps(self) -> int:
        """Of each run."""
        return len(self.baseline)

    def __str__(self) -> str:
        """A table of the rates: how much each lowers the loss, and which was chosen."""
        sure = "" if self.learned else ", a guess: no rate lowered the loss"
        lines = [f"lr {self.lr:.3g}, found by {self.forwards} forwards{sure}"]
        lines.append(
            f"{'lr':>10}  loss against lr 0, there {self._from():.4g}, in the second half of {self.steps} steps"
        )
        for each in self.tried:
            change = f"diverged in {len(each.losses)} steps" if each.gain is None else f"{-each.gain:+.3g}"
            lines.append(f"{each.lr:>10.3g}  {change}" + (" < chosen" if each.lr == self.lr else ""))
        return "\n".join(lines)

    def _from(self) -> float:
        return fmean(self.baseline[len(self.baseline) // 2 :])


def find_lr(
    model: nn.Module,
    closures: Callable[[], Iterable[StepClosures]],
    *,
    optimizer: Callable[..., ZeroOrderOptimizer] = MeZO,
    steps: int | None = None,
    start: float | None = None,
    most: int = 16,
    **options: Any,
) -> FoundLR:
    """Find a learning rate for the weights as they are, and leave them as they are, bit for bit.

    Each rate gets a run of a few steps with the same batches and the same random directions, so that rates can be
    compared although losses are noisy. The run's losses are compared with those of lr = 0: batch by batch, on average
    over the second half of the steps. Rates differ by factors of two. The first one would change the loss by a tenth in
    a step if the loss were linear; the next ones surround the best. A rate has diverged, and is stopped, when the
    losses of five steps lie on average a tenth of the loss above those of lr = 0. Of all rates the smallest is taken
    that gains four fifths of the largest gain: too large a rate costs more than one that is as much too small. It is
    right for the beginning of a run; let it fall in a long one, or halve it.

        found = zo.find_lr(model, lambda: (partial(loss_of, batch) for batch in batches), optimizer=zo.FZOO)
        print(found)
        opt = zo.FZOO(model, lr=found.lr)

    The price is that of five to eight runs, with 40 steps 300 to 600 forwards (MeZO-SVRG twice that), however many
    steps follow. Noise may still move the result by a factor of two; more `steps` settle it. Trained weights
    and buffers are kept meanwhile as a copy in the memory of the CPU, since passes round and no replay leads back to
    the start. Call this before the run's optimizer takes steps, which would note a change from outside. All ranks call
    it together and find the same rate.

    Args:
        model: the module whose weights are trained; those that require grad.
        closures: returns the closures of the steps, one after the other, at least `steps` of them, and the same ones
            each time that it is called. For MeZO-SVRG each is a pair, of its two closures. The random generators of
            PyTorch, NumPy and Python are in the same state at each call, and at the end as they were before.
        optimizer: a class of `zo_kernels`, or a function that takes model, lr and options and makes an optimizer.
        steps: of each run, at least 10. The noisier the losses, the more are needed. None: 40, or 10 if a step has
            several directions, which average the noise.
        start: the rate to begin with. None: chosen by the first losses, for whatever units the optimizer has.
        most: how many rates are tried at most.
        options: of the optimizer, such as eps, seed and directions; they are those of the run that follows.

    Raises:
        TypeError, ValueError: an argument is wrong, `closures` returns too few closures or others than the first time,
            or every rate diverged. Errors of a step are those of `ZeroOrderOptimizer.step`. The weights are as before
            also after any exception and Ctrl-C.

    Warns:
        UserWarning: no rate lowered the loss, so that the result is only known not to diverge at once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, function in (("closures", closures), ("optimizer", optimizer)):
        if not callable(function):
            what = "a class such as zo_kernels.FZOO, or a function" if name == "optimizer" else "a function"
            raise TypeError(f"{name}: expected {what}, got {type(function).__name__}")
    for name, why in (("lr", "it is what is looked for"), ("trajectory", "the runs are given up")):
        if name in options:
            raise ValueError(f"{name}: expected no such option of find_lr, since {why}; leave it out")
    if steps is not None:
        checks.integer("steps", steps, _LEAST_STEPS)
    checks.integer("most", most, 1)
    if start is not None:
        checks.number("start", start, 0.0, open_low=True)
    kept = _Kept(model)
    try:
        return _Search(kept, closures, lambda lr: optimizer(model, lr=lr, **options), steps, most).find(start)
    finally:
        kept.put_back()


class _Search:
    """Runs rates as they are asked for."""

    def __init__(
        self,
        kept: _Kept,
        closures: Callable[[], Iterable[StepClosures]],
        make: Callable[[float], ZeroOrderOptimizer],
        steps: int | None,
        most: int,
    ):
        self._kept, self._closures, self._make, self._most = kept, closures, make, most
        self._steps = steps or 0  # 0: not known yet
        self._tried: dict[int, TriedLR] = {}
        self._baseline: tuple[float, ...] = ()  # losses with lr = 0
        self._size = 0.0  # of a loss
        self._slopes: list[float] = []  # of the steps with lr = 0: by how much lr lowers the loss, to first order
        self._forwards = 0

    def find(self, start: float | None) -> FoundLR:
        self._baseline = self._run(0.0)
        finite = [abs(loss) for loss in self._baseline if math.isfinite(loss)]
        if 2 * len(finite) <= len(self._baseline):
            raise ValueError(
                "closures: expected most losses to be finite at the weights as they are, got "
                f"{len(self._baseline) - len(finite)} of {len(self._baseline)} that are not"
            )
        self._size = fmean(finite)
        first = self._first() if start is None else start
        while (at := self._next()) is not None:
            if len(self._tried) == self._most:
                raise ValueError(
                    f"most: expected the best rate to be among {self._most}, but of those from "
                    f"{first * 2.0 ** min(self._tried):.3g} to {first * 2.0 ** max(self._tried):.3g} "
                    f"{'it is the first or the last' if self._gains() else 'all diverged'}; change start= or most=, or "
                    "a rate that the search leaves alone, such as anchor_lr="
                )
            self._tried[at] = self._try(first * 2.0**at)
        chosen, learned = self._chosen()
        if not learned:
            warn(
                f"find_lr: no learning rate lowered the loss within {self._steps} steps, so {chosen:.3g}, a quarter of "
                "the largest that did not diverge, is a guess; more steps= or larger batches tell more"
            )
        tried = tuple(self._tried[at] for at in sorted(self._tried))
        return FoundLR(chosen, learned, tried, self._baseline, self._forwards)

    def _gains(self) -> dict[int, float]:
        return {at: each.gain for at, each in self._tried.items() if each.gain is not None}

    def _next(self) -> int | None:
        """The rate to try next, in factors of two above the first; None if the best one is known."""
        if not self._tried:
            return 0
        gains, lowest = self._gains(), min(self._tried)
        if not gains:
            return lowest - 1
        best = max(gains, key=lambda at: (gains[at], -at))
        if best + 1 not in self._tried:
            return best + 1
        if gains[best] > 0.0:
            return None if best - 1 in self._tried else best - 1
        return lowest - 1 if lowest > max(gains) - _LAST_FACTORS else None

    def _chosen(self) -> tuple[float, bool]:
        """The rate, and whether it lowers the loss."""
        gains = self._gains()
        if (most := max(gains.values())) > 0.0:
            return self._tried[min(at for at, gain in gains.items() if gain >= _ENOUGH * most)].lr, True
        return self._tried[max(gains)].lr / 4, False

    def _first(self) -> float:
        """The power of two below the rate that changes the loss by a tenth of its size in a step."""
        slope = fmean(self._slopes)
        if not slope > 0.0 or not self._size > 0.0:
            raise ValueError(
                f"closures: expected losses that depend on the trained weights, got {self._baseline[0]:.6g} on both "
                f"sides of them in {self._steps} steps; is `model` the one that the closures call?"
            )
        return 2.0 ** math.floor(math.log2(_FIRST * self._size / slope))

    def _try(self, lr: float) -> TriedLR:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run with lr = 0 has warned of all but divergence
            losses = self._run(lr)
        half = self._steps // 2
        rises = self._rises(losses, half) or self._rises(losses, 0)
        whole = len(losses) == self._steps and not self._diverged(losses)
        return TriedLR(lr, losses, -fmean(rises) if whole else None)

    def _rises(self, losses: Sequence[float], first: int) -> list[float]:
        """How far losses are above those with lr = 0, from one step on, in steps that have some there."""
        pairs = zip(losses[first:], self._baseline[first:], strict=False)
        return [loss - at_start for loss, at_start in pairs if math.isfinite(at_start)]

    def _diverged(self, losses: Sequence[float]) -> bool:
        """Whether the last losses are far above those with lr = 0, or not finite."""
        rises = self._rises(losses, max(0, len(losses) - _WINDOW))
        return not sum(rises) <= _RISE * self._size * len(rises)

    def _run(self, lr: float) -> tuple[float, ...]:
        """The losses of a run from the start; it ends early if it diverges."""
        self._kept.put_back()
        opt, losses, waiting, taken = self._make(lr), list[float](), list[Tensor | float](), 0
        if not isinstance(opt, ZeroOrderOptimizer):
            raise TypeError(f"optimizer: expected it to make a zo_kernels optimizer, got {type(opt).__name__}")
        self._kept.check_holds(opt)
        if lr == 0.0:  # also where a group has a rate of its own, as MeZO-SVRG's at its anchors
            for group in opt.param_groups:
                group.update({name: 0.0 for name in ("lr", "anchor_lr") if name in group})
        self._steps = self._steps or (_STEPS if opt.directions == 1 else _LEAST_STEPS)
        for taken, each in enumerate(islice(self._closures(), self._steps), 1):
            closures = each if isinstance(each, tuple) else (each,)
            try:
                waiting.append(opt.step(*map(self._counted, closures)))
                if lr == 0.0:
                    self._slopes.append(_slope(opt))
            except OutOfRange:  # the step is skipped, as it would be in a run
                if self._baseline and math.isfinite(self._baseline[taken - 1]):
                    break
                waiting.append(math.nan)
            if taken % _WINDOW == 0 or taken == self._steps:  # to read losses waits for a GPU
                losses += map(float, waiting)
                waiting.clear()
                self._check_same(losses)
                if lr != 0.0 and self._diverged(losses):
                    break
        else:
            if taken < self._steps:
                raise ValueError(
                    f"closures: expected at least {self._steps} closures, as many as steps, got {taken}; begin the "
                    "data again when they end (go over the loader in a `while True`), or set steps="
                )
        return (*losses, *map(float, waiting))

    def _counted(self, closure: Closure) -> Closure:
        checked = check_closure("closures", closure)

        def counted() -> Any:
            self._forwards += 1
            return checked()

        return counted

    def _check_same(self, losses: Sequence[float]) -> None:
        """Check that the first loss, which is one at the start whatever the rate is, is that of the first run."""
        first = self._baseline[0] if self._baseline else math.nan
        if math.isfinite(first) and not abs(losses[0] - first) <= _SAME * abs(first):
            raise ValueError(
                f"closures: expected the same closures each time it is called, got {first:.6g} for the first loss of "
                f"one run and {losses[0]:.6g} for that of another, at the same weights; begin from the same batch each "
                "time, as with a generator that is made anew from its seed"
            )


class _Kept:
    """A copy of what runs change: trained weights, buffers, and the states of random generators."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._frozen = [(p, not p.requires_grad) for p in model.parameters()]
        self._weights = {p: local(p).detach().to("cpu", copy=True) for p in model.parameters() if p.requires_grad}
        self._buffers = {name: local(b).detach().to("cpu", copy=True) for name, b in model.named_buffers()}
        self._generators = _generators()

    def check_holds(self, opt: ZeroOrderOptimizer) -> None:
        """Raise ValueError if an optimizer trains a weight that could not be put back."""
        trained = (p for group in opt.param_groups for p in group["params"] if p.requires_grad)
        if others := [p for p in trained if p not in self._weights]:
            names = {p: name for name, p in self._model.named_parameters()}
            what = names.get(others[0], f"a tensor of shape {tuple(others[0].shape)}")
            raise ValueError(
                "optimizer: expected it to train what requires grad in `model` when find_lr is called, got also "
                f"{what}; unfreeze it before, or give a module that holds all of it"
            )

    def put_back(self) -> None:
        """Restore everything, also if exceptions come from outside meanwhile; these are raised afterwards."""
        another: BaseException | None = None
        for _ in range(_TRIES):
            try:
                with signals_held(), torch.no_grad():
                    self._put_back()
                break
            except BaseException as later:
                another = later
        if another is not None:
            raise another

    def _put_back(self) -> None:
        for p, kept in self._weights.items():
            with inference_mode(p.is_inference()):
                local(p).detach().copy_(kept)
        for p, frozen in self._frozen:
            if p.requires_grad is frozen:
                p.requires_grad_(not frozen)
        for name, b in self._model.named_buffers():
            before, now = self._buffers.get(name), local(b)
            # A cache may be new, or of another shape; and what repeats its elements in memory can only be read.
            if before is not None and before.shape == now.shape and not torch.equal(before, now.cpu()):
                now.copy_(before)
        _set_generators(self._generators)


def _generators() -> list[Any]:
    """The states of the random generators of PyTorch, Python and NumPy."""
    numpy: Any = sys.modules.get("numpy")
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), on_gpus, random.getstate(), None if numpy is None else numpy.random.get_state()]


def _set_generators(states: Sequence[Any]) -> None:
    on_cpu, on_gpus, of_python, of_numpy = states
    torch.set_rng_state(on_cpu)
    if on_gpus:
        torch.cuda.set_rng_state_all(on_gpus)
    random.setstate(of_python)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)


def _slope(opt: ZeroOrderOptimizer) -> float:
    """By how much a step lowers the loss in units of lr, to first order: E[g²] / D."""
    g = opt.projected_gradients
    square = fmean(x * x for x in g)
    if opt.normalize == "rms":
        return math.sqrt(square)
    deviation = stdev(g) if opt.normalize == "std" else 1.0
    return square / deviation if deviation else 0.0
