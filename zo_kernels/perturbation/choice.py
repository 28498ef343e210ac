"""Where the probes of an optimizer are evaluated, chosen in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, device, nn

from .. import checks
from ..warn import Warner
from ..weights.tables import Weights
from .engine import Engine
from .in_forward import InForward, cannot_perturb_in_forward
from .in_place import InPlace
from .place import Place
from .streamed import Streamed, StreamedEngine, settle

PERTURB = ("auto", "in_place", "in_forward")


class Perturbation:
    """What the user asked for, what that comes to with the weights as they are, and the place in use.

    Args:
        module: what the optimizer was given; None if it was given parameters.
        asked: one of PERTURB.
        execution_device: the device that modules run on, if weights are elsewhere.
        splits_directions: whether ranks evaluate different directions.

    Attributes:
        name: "in_place" or "in_forward".
        place: for the tables that are valid; None before the first ones.

    Raises:
        TypeError, ValueError: what was asked for cannot be.
    """

    place: Place | None = None
    name = ""

    def __init__(
        self, module: nn.Module | None, asked: str, execution_device: Any, splits_directions: bool, warner: Warner
    ):
        self._module, self._asked, self._splits_directions, self._warner = module, asked, splits_directions, warner
        self.execution_device: device | None = None
        if execution_device is not None:
            if (reason := cannot_perturb_in_forward(module)) or asked == "in_place":
                raise ValueError(
                    f"execution_device: expected perturb='in_forward' with it, got {asked!r}"
                    if not reason
                    else f"execution_device: it needs perturb='in_forward', which cannot be: {reason}"
                )
            self.execution_device = checks.usable_device("execution_device", execution_device)

    def choose(self, trainable: Sequence[Tensor]) -> None:
        """Decide between in place and in the forward, for these weights.

        Raises:
            ValueError: what was asked for is not possible with them.
        """
        self.name = self._chosen(trainable)

    def _chosen(self, trainable: Sequence[Tensor]) -> str:
        asked, reason = self._asked, cannot_perturb_in_forward(self._module)
        if asked == "in_forward" and reason:
            raise ValueError(f"perturb: 'in_forward' cannot be: {reason}")
        if self._splits_directions:
            if asked == "in_place" or reason:
                raise ValueError(
                    "parallel: 'directions' needs perturb='in_forward', since weights that each rank moves along its "
                    f"own directions in place are rounded differently, but {reason or 'got in_place'}; use 'batch'"
                )
            return "in_forward"
        if self.execution_device is not None:
            return "in_forward"
        if asked != "auto" or all(p.element_size() >= 4 for p in trainable):
            return "in_place" if asked == "auto" else asked
        if reason:
            self._warner.warn(
                "drift",
                "perturbing 16-bit weights in place rounds them three times a step, so they drift; in the forward they "
                f"would not, but {reason} (perturb='in_place' silences this warning)",
            )
            return "in_place"
        return "in_forward"

    def settle(self) -> None:
        """With `execution_device`, move buffers there and pin parameters, those that came since, too."""
        if self.execution_device is not None:
            assert self._module is not None
            settle(self._module, self.execution_device)

    def use(self, weights: Weights) -> None:
        """Make the place for new tables."""
        if self.name == "in_place":
            self.place = InPlace(weights)
            return
        assert self._module is not None
        if self.execution_device is None:
            self.place = InForward(Engine(self._module, weights), weights, self._warner)
        else:
            engine = StreamedEngine(self._module, weights, self.execution_device)
            self.place = Streamed(engine, weights, self._warner)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "place": None}  # of the tables, which a copy builds anew
