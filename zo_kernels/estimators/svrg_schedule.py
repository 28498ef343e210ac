"""MeZO-SVRG's schedule of learning rates: all are divided by a factor when the loss rises from anchor to anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .. import checks
from ..closures.losses import Pair
from ..weights.rows import device_of, stacked

ABOVE = 1.05  # κ of the published code


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often the rates were divided, and the loss that the next anchor's is compared with.

    Attributes:
        anneal: what the rates are divided by; None if they never are.
        above: how many times the loss at the anchor before a loss must be for that.
        annealed: how often they were divided.
        loss: the mean loss at the last anchor; None before the first, and where nothing is divided.
    """

    anneal: float | None
    above: float = ABOVE
    annealed: int = 0
    loss: float | None = None

    @classmethod
    def of(cls, anneal: Any, above: Any, annealed: int = 0, loss: float | None = None, *, where: str = "") -> Schedule:
        """Return a schedule of these options; `where` comes before their names in messages.

        Raises:
            TypeError, ValueError: an option is invalid.
        """
        factor = None if anneal is None else checks.number(f"{where}anneal", anneal, 1.0, open_low=True)
        return cls(factor, checks.number(f"{where}anneal_above", above, 1.0), annealed, loss)

    def after(self, loss: float) -> Schedule:
        """Return the schedule after an anchor of this loss."""
        if self.anneal is None:
            return self
        # For a loss below zero, too, such as a negative F1, "1.05 times" means a rise of 5 %.
        rises = self.loss is not None and loss - self.loss > (self.above - 1) * abs(self.loss)
        return replace(self, annealed=self.annealed + rises, loss=loss)

    def at_anchor(self, pairs: Sequence[Pair]) -> Schedule:
        """Return the schedule after an anchor with the losses (L+, L-) of each direction; this waits for a device.

        The rates are recorded when the step is taken, so they must be known by then.
        """
        if self.anneal is None:
            return self
        values: Any = [value for pair in pairs for value in pair]
        if (where := device_of(*values)) is not None:
            values = stacked(values, where).tolist()
        return self.after(sum(values) / len(values))

    def if_taken(self, new: Schedule, ok: bool | Tensor) -> Schedule:
        """Return `new`, or this one if the device skips the step of the anchor."""
        return new if self.anneal is None or bool(ok) else self

    def divided(self, rates: list[float]) -> list[float]:
        """Return the rates, divided as often as they should be."""
        return [rate * self.anneal**-self.annealed for rate in rates] if self.anneal is not None else rates

    @property
    def numbers(self) -> tuple[float, ...]:
        """What a setup keeps of it: nothing, or its options, `annealed` and, if there is one, `loss`."""
        if self.anneal is None:
            return ()
        return (self.anneal, self.above, float(self.annealed), *(() if self.loss is None else (self.loss,)))

    @classmethod
    def of_setup(cls, numbers: Sequence[float]) -> Schedule:
        """Return that which a trajectory's setup has."""
        if not numbers:
            return cls(None)
        anneal, above, annealed, *loss = numbers
        return cls(anneal, above, int(annealed), *loss)

    def options(self) -> list[str]:
        """Return texts "name: value" of the options."""
        return [f"anneal: {self.anneal}", f"anneal_above: {self.above}"]

    def agreed(self) -> list[str]:
        """Return texts "name: value" of what may change in every step."""
        return [] if self.anneal is None else [f"annealed: {self.annealed}", f"loss at the last anchor: {self.loss}"]

    def state(self) -> dict[str, Any]:
        """Return what a state has of it."""
        return {
            "anneal": self.anneal,
            "anneal_above": self.above,
            "annealed": self.annealed,
            "anchor_loss": self.loss,
        }

    def in_state(self, zo: Mapping[str, Any], steps: int) -> Schedule:
        """Check and return the schedule in a state. A state of an earlier version has none: this one begins with it.

        Args:
            zo: what the state has under "zo".
            steps: the state's step count.

        Raises:
            TypeError, ValueError: a value is invalid; the message names it.
        """
        at, loss = "state_dict: zo.", zo.get("anchor_loss")
        if "anneal" not in zo:
            return Schedule(self.anneal, self.above)
        return Schedule.of(
            zo["anneal"],
            zo.get("anneal_above", ABOVE),
            checks.integer(f"{at}annealed", zo.get("annealed", 0), 0, steps),
            None if loss is None else checks.number(f"{at}anchor_loss", loss),
            where=at,
        )
