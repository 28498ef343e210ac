"""The trainable weights of an optimizer: their names and ids, groups and options, thresholds, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, device, nn

from .. import checks, names
from ..layouts import layouts
from .groups import check_eps, check_group, check_owned
from .in_forward import InForward
from .overflow import Reach
from .shards import Shard, cannot_be_trained, local, shard_of
from .streamed import StreamedInForward, settle
from .thresholds import magnitude_threshold
from .warned import Doubts
from .weights import Weight, Weights


class TrainedWeights(torch.optim.Optimizer):
    """What an optimizer trains, as tables that are built anew when that changes."""

    backend: str | None
    perturb: str
    rounding: str
    _module: nn.Module | None
    _norms: set[Tensor]
    _names: dict[Tensor, str]
    _ids: dict[Tensor, int]
    _block_of: dict[Tensor, int]
    _thresholds: dict[Tensor, float]
    _weights: Weights | None
    _built_for: tuple[list[Any], int] | None
    _in_forward: InForward | None
    _builds: int
    _steps_since_built: int
    _execution_device: device | None
    _reshard: Callable[[], None] | None
    _doubts: Doubts

    def _name(self) -> dict[Tensor, str]:
        """Each parameter's name; those of a module include what is frozen, so that freezing changes no id."""
        if self._module is not None:
            return names.of_module(self._module)
        every: dict[Tensor, str] = {}
        for group in self.param_groups:
            names.add_group(every, group)
        return every

    def _identify(self) -> dict[Tensor, int]:
        ids = names.param_ids(self._names.values())
        return {p: ids[name] for p, name in self._names.items()}

    def _trainable(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _prepare(self) -> Weights:
        """The tables, built anew if a parameter was frozen, unfrozen, moved or added since the last pass."""
        parameters = self._trainable()
        here = [*map(local, parameters)]
        if self._weights is not None and self._signature(parameters, here) == self._built_for:
            return self._weights
        if self._built_for is None:
            if reason := cannot_be_trained(self._module, [(self._names[p], p) for p in parameters]):
                raise ValueError(reason)
            for p, t in zip(parameters, here, strict=True):
                checks.weight(self._names[p], t)
        if self._execution_device is not None:
            assert self._module is not None
            settle(self._module, self._execution_device)  # what has come since is not there yet
            here = [*map(local, parameters)]
        signature = self._signature(parameters, here)
        if self._built_for is not None and self._built_for[0] != signature[0]:
            self._on_other_weights()
        found = []
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                name = self._names[p]
                exempt = p in self._norms or p.dim() < 2
                row = 2 * g + int(exempt and not group["decay_all"])
                shard = shard_of(name, p)
                threshold = self._threshold(p, shard, group)
                found.append(Weight(name, p, shard, self._ids[p], row, self._block_of.get(p), threshold))
        if not found:
            raise ValueError("params: expected at least one parameter that requires grad, got none")
        reach = Reach.of({w.tensor.dtype for w in found})
        for group in self.param_groups:
            reach.check_eps(check_eps("eps", group["eps"]))
        anchors = self._anchors(found)
        keep_masks = self.perturb == "in_place" or anchors is not None
        rows, stochastic = 2 * len(self.param_groups), self.rounding != "nearest"
        self._weights = None  # an exception from outside may come at any line
        self._builds += 1
        weights = Weights(
            found, rows, stochastic, anchors, keep_masks, self.backend, self._reshard, self._execution_device
        )
        if self.perturb == "in_forward":
            assert self._module is not None
            if self._execution_device is None:
                self._in_forward = InForward(self._module, weights)
            else:
                self._in_forward = StreamedInForward(self._module, weights, self._execution_device)
        self._built_for, self._steps_since_built = signature, 0
        self._weights = weights
        return weights

    def _signature(self, parameters: Sequence[Tensor], here: Sequence[Tensor]) -> tuple[list[Any], int]:
        """What the tables are valid for: parameters, and what of each is here."""
        # In every step, of hundreds of tensors: lists are made and compared faster than a tuple for each.
        memory = [*map(Tensor.data_ptr, here)], [*map(Tensor.numel, here)], layouts(here)
        return [[*map(id, parameters)], *memory, [p.dtype for p in parameters]], len(self.param_groups)

    def _on_other_weights(self) -> None:
        """Called when other memory is trained than in the last step."""

    def _anchors(self, weights: Sequence[Weight]) -> Sequence[Tensor] | None:
        """Snapshots that passes may start from, for methods that have them."""
        return None

    def _threshold(self, p: Tensor, shard: Shard, group: dict[str, Any]) -> float | None:
        if group["sparsity"] == 0.0:
            return None
        if p not in self._thresholds:
            self._thresholds[p] = magnitude_threshold(shard, group["sparsity"])
        return self._thresholds[p]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the new parameters take part from the next step on."""
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            where = f"param_groups[{len(self.param_groups)}]: "
            check_group({**self.defaults, **param_group}, where)
            if getattr(self, "perturb", None) == "in_forward":
                assert self._module is not None
                check_owned(param_group, self._module, where)
        super().add_param_group(param_group)
        if hasattr(self, "_names"):  # not while the base class is adding the first groups
            names.add_group(self._names, self.param_groups[-1])
            self._ids = self._identify()

    def _eps(self) -> float:
        values = {group["eps"] for group in self.param_groups}
        if len(values) != 1:
            raise ValueError(f"eps: expected one value for all groups, got {sorted(values)}")
        return check_eps("eps", values.pop())

    def _rates(self) -> list[float]:
        """A learning rate for each row."""
        return [checks.number("lr", g["lr"], 0.0) for g in self.param_groups for _ in range(2)]

    def _weight_decays(self) -> list[float]:
        """Of each row: the odd rows are exempt."""
        decays = [checks.number("weight_decay", g["weight_decay"], 0.0) for g in self.param_groups]
        return [w for decay in decays for w in (decay, 0.0)]
