"""SPSA: differences of two losses along random directions (Spall 1992; MeZO, arXiv 2305.17333; FZOO, 2506.09034)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .. import checks
from ..interrupts import Call
from ..perturbation.place import Probes
from ..trajectory import TWO_SIDED, Difference, Kind, Setup
from ..trajectory.difference import DIFFERENCES
from ..warn import warn
from ..weights.rows import decay_factors
from .normalize import RMS, Normalizer, checked_normalizer
from .numbers import NOT_NORMALIZED, Numbers, spsa_update
from .protocol import Estimate, Estimator, ReplayedEnd, Step


class SPSA(Estimator):
    """An estimate along n directions. In place, the last pass goes back to θ and makes the update.

    two-sided: g_k = (L(θ + ε z_k) - L(θ - ε z_k)) / 2ε   2n forwards, and in place 2n + 1 passes
    one-sided: g_k = (L(θ + ε z_k) - L(θ)) / ε            n + 1 forwards, and in place n + 1 passes

    θ <- decay θ - lr / (n D) sum_k g_k z_k

    Attributes:
        difference: one of the two.
        normalizer: D; it is replaced together with the pass that makes the update.
    """

    def __init__(self, difference: Difference = TWO_SIDED, normalizer: Normalizer = NOT_NORMALIZED):
        self.difference, self.normalizer = difference, normalizer
        self.name, self.normalize = difference.name, normalizer.kind

    @property
    def kind(self) -> Kind:
        """The kind of its records."""
        return Kind.ONE_SIDED if self.difference.one_sided else Kind.STEP

    def check_directions(self, directions: int) -> None:
        self.normalizer.check_directions(directions)

    def estimate(self, step: Step) -> Estimate:
        (closure,), seeds = step.closures, step.draws.seeds()
        self.check_directions(len(seeds))
        probes = step.probes(step.weights.active(step.draws.dropped()))
        losses = step.losses(probes, closure, seeds, self.difference)
        numbers = self.numbers(losses.pairs, step, step.rates, decay_factors(step.rates, step.weight_decays))
        return Estimate(self.kind, losses, numbers, partial(self.finish_step, probes, seeds, numbers), step.rates)

    def numbers(self, pairs: Sequence[Any], step: Step, rates: Any, decays: Any) -> Numbers:
        """Compute the numbers of a step from its losses."""
        span, reach = self.difference.span(step.eps), step.weights.reach
        return Numbers.of([pairs], span, rates, decays, reach=reach, normalizer=self.normalizer)

    def finish_step(self, probes: Probes, seeds: Sequence[Any], numbers: Numbers, then: Sequence[Call]) -> None:
        """Make the update, and take the normalizer for the next step."""
        update = spsa_update(seeds, numbers.along, numbers.rates)
        noted = (
            [] if numbers.normalizer is self.normalizer else [partial(setattr, self, "normalizer", numbers.normalizer)]
        )
        probes.finish(update, numbers.decays, [*noted, *then])

    def setup_fields(self) -> dict[str, Any]:
        own = {"estimator": self.name, "normalize": self.normalize, "rms": self.normalizer.numbers}
        return {**super().setup_fields(), **own}

    def check_setup(self, setup: Setup) -> None:
        for option, own, given in (
            ("estimator", self.name, setup.estimator),
            ("normalize", self.normalize, setup.normalize),
        ):
            if own != given:
                raise ValueError(
                    f"resume: expected a run of {option} {own!r}, as this optimizer has, got one of {given!r}; make "
                    f"the optimizer with {option}={given!r}"
                )

    def options(self) -> list[str]:
        return [f"estimator: {self.name}", f"normalize: {self.normalize} {self.normalizer.numbers or ''}".rstrip()]

    def state(self, groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
        return {"estimator": self.name, "normalize": self.normalize, "rms": list(self.normalizer.numbers)}

    def check_state(self, zo: Mapping[str, Any], groups: int, blocks: int, steps: int) -> dict[str, Any]:
        at = "state_dict: zo."
        given = checks.choice(f"{at}estimator", zo.get("estimator", TWO_SIDED.name), tuple(DIFFERENCES))
        if given != self.name:
            raise ValueError(
                f"{at}estimator: expected {self.name!r}, as this optimizer has, got {given!r}; make the optimizer with "
                f"estimator={given!r}"
            )
        normalizer = checked_normalizer(zo, self.normalizer, at)
        normalizer.check_directions(zo["directions"])
        return {"normalizer": normalizer}

    def load_state(
        self, run: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        self.normalizer = run["normalizer"]
        return False

    def continue_from(
        self, end: ReplayedEnd, setup: Setup, trained: set[str], kept: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        if (own := self.normalizer.rms) != end.normalizer.rms:
            warn(f"resume: the run had normalize={end.normalizer.rms} (not {own}); the run's is taken")
        self.normalizer = end.normalizer


def chosen(estimator: str, normalize: str | RMS, directions: int, own: Estimator | None) -> Estimator:
    """Return the estimator that an optimizer's options choose, or that which its method has.

    Raises:
        TypeError, ValueError: an option is invalid, or was given although the method has an estimator of its own.
    """
    checks.choice("estimator", estimator, tuple(DIFFERENCES))
    normalizer = Normalizer.of(normalize)
    if own is not None and (estimator != TWO_SIDED.name or normalizer.kind != "none"):
        option = "estimator" if estimator != TWO_SIDED.name else "normalize"
        raise ValueError(f"{option}: this method has an estimator of its own, {own.name}; leave the option out")
    result = SPSA(DIFFERENCES[estimator], normalizer) if own is None else own
    result.check_directions(directions)
    return result
