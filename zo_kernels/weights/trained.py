"""The trainable weights of an optimizer: their names and ids, groups and options, thresholds, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, device, nn

from .. import checks, names
from ..layouts import layouts
from ..perturbation.in_forward import InForward
from ..perturbation.in_forward_probes import cannot_perturb_in_forward
from ..perturbation.streamed import StreamedInForward, settle
from ..ranks.parallel import Ranks
from ..warn import Warner
from .blocks import block_of_parameters
from .groups import check_eps, check_group, check_keys, check_owned, given_blocks, name_group, norm_parameters
from .masks import Thresholds
from .overflow import Reach
from .shards import cannot_be_trained, local, shard_of
from .structure import Structure
from .tables import Weight, Weights


class TrainedWeights(torch.optim.Optimizer):
    """What an optimizer trains, as tables that are built anew when that changes."""

    _more_options: tuple[str, ...] = ()  # of a group, that a method has besides
    backend: str | None
    perturb: str
    rounding: str
    _module: nn.Module | None
    _norms: set[Tensor]
    _names: dict[Tensor, str]
    _ids: dict[Tensor, int]
    _structure: Structure | None
    _blocks: Sequence[nn.Module] | None  # as they were given
    _n_blocks: int
    _block_of: dict[Tensor, int]
    drop: float
    _asked_perturb: str
    _ranks: Ranks | None
    _thresholds: Thresholds
    _weights: Weights | None
    _built_for: tuple[list[Any], int] | None
    _in_forward: InForward | None
    _builds: int
    _steps_since_built: int
    _execution_device: device | None
    _reshard: Callable[[], None] | None
    _warner: Warner

    def _derive(self) -> None:
        """What follows from the module and the groups: names, noise, blocks, and what weight decay leaves alone."""
        now = {} if self._module is None else names.of_module(self._module)
        # What has a name keeps it, wherever it is moved to: by it goes its noise, and a trajectory.
        every = {p: self._names[p] for p in now if p in self._names}
        taken = set(every.values())
        for p, name in [*now.items(), *self._names.items()]:
            if p not in every:
                every[p] = names.free(name, taken)
        for group in self.param_groups:
            names.add_group(every, group)
        ids = names.param_ids(every.values())
        found = given_blocks(self._module, self._blocks, self.drop)
        self._names, self._ids = every, {p: ids[name] for p, name in every.items()}
        self._norms = norm_parameters(self._module)
        self._n_blocks, self._block_of = len(found), block_of_parameters(found)

    def _derive_anew(self) -> None:
        """As `_derive`, after modules or parameters came, went or were replaced.

        Raises:
            ValueError: what is trained is no longer what the module has; nothing is changed.
        """
        assert self._structure is not None
        if self._reshard is not None:
            self._reshard()  # parameters that FSDP has gathered are no others
            if not self._structure.changed(self._parameters):
                return
        parameters = self._parameters()
        self._structure.check(parameters)
        before = [self._derived(p) for p in parameters]
        self._derive()
        self._structure.look(parameters)
        if before != [self._derived(p) for p in parameters]:
            self._weights = None
            self._on_other_weights()

    def _derived(self, p: Tensor) -> tuple[Any, ...]:
        return self._names[p], self._ids[p], self._block_of.get(p), p in self._norms

    def _stream_to(self, where: Any, perturb: str) -> device:
        if (reason := cannot_perturb_in_forward(self._module)) or perturb == "in_place":
            raise ValueError(
                f"execution_device: expected perturb='in_forward' with it, got {perturb!r}"
                if not reason
                else f"execution_device: it needs perturb='in_forward', which cannot be: {reason}"
            )
        return checks.usable_device("execution_device", where)

    def _choose_perturb(self) -> str:
        """What was asked for, or what "auto" comes to with the weights as they are."""
        asked = self._asked_perturb
        reason = cannot_perturb_in_forward(self._module)
        if asked == "in_forward" and reason:
            raise ValueError(f"perturb: 'in_forward' cannot be: {reason}")
        if self._ranks is not None and self._ranks.how.split == "directions":
            if asked == "in_place" or reason:
                raise ValueError(
                    "parallel: 'directions' needs perturb='in_forward', since weights that each rank moves along its "
                    f"own directions in place are rounded differently, but {reason or 'got in_place'}; use 'batch'"
                )
            return "in_forward"
        if self._execution_device is not None:
            return "in_forward"
        if asked != "auto" or all(p.element_size() >= 4 for p in self._trainable()):
            return "in_place" if asked == "auto" else asked
        if reason:
            self._warner.warn(
                "drift",
                "perturbing 16-bit weights in place rounds them three times a step, so they drift; in the forward they "
                f"would not, but {reason} (perturb='in_place' silences this warning)",
            )
            return "in_place"
        return "in_forward"

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _trainable(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _prepare(self) -> Weights:
        """The tables, built anew if a parameter was frozen, unfrozen, moved, cast or added since the last pass."""
        if self._structure is not None and self._structure.changed(self._parameters):
            self._derive_anew()
        parameters = self._trainable()
        here = [*map(local, parameters)]
        stale = self._thresholds.forget_stale(self.param_groups, self._names)
        if self._weights is not None and not stale and self._signature(parameters, here) == self._built_for:
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
        self.perturb = self._choose_perturb()
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
                threshold = self._thresholds.take(p, shard, group["sparsity"])
                found.append(Weight(name, p, shard, self._ids[p], row, self._block_of.get(p), threshold))
        if not found:
            raise ValueError(
                "params: expected at least one parameter that requires grad, got none; if they were frozen since the "
                "optimizer was made (as peft does when it adds an adapter), make it afterwards"
            )
        self._thresholds.name_dense(found, self.param_groups)
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
        else:
            self._in_forward = None
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the new parameters take part from the next step on. Those of the
        module that the optimizer was given need no names: they are called what they are called there. Keys that are no
        options are refused.
        """
        made = hasattr(self, "_names")  # if not, the base class is adding the first groups
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            where = f"param_groups[{len(self.param_groups)}]: "
            check_keys(param_group, [*self.defaults, *self._more_options], where)
            check_group({**self.defaults, **param_group}, where)
            if made and self._module is not None:
                name_group(param_group, self._module, self._names)
                if self.perturb == "in_forward":
                    check_owned(param_group, self._module, where)
        super().add_param_group(param_group)
        if made:
            self._derive()

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
