"""What an optimizer trains: parameters with names, noise ids, blocks and thresholds, as tables that follow changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, device, nn

from .. import checks, names
from ..layouts import layouts
from ..warn import Warner
from .blocks import block_of_parameters, why_drop_is_useless
from .groups import check_eps, check_owned, name_group, norm_parameters, resolve_blocks
from .masks import Thresholds
from .overflow import Reach
from .shards import cannot_be_trained, local, resharding, shard_of
from .structure import Structure
from .tables import Weight, Weights

Groups = Sequence[Mapping[str, Any]]  # torch.optim's parameter groups


def every_parameter(groups: Groups) -> list[Tensor]:
    """The parameters of all groups, frozen ones too."""
    return [p for group in groups for p in group["params"]]


def trainable(groups: Groups) -> list[Tensor]:
    """The parameters that require grad."""
    return [p for group in groups for p in group["params"] if p.requires_grad]


class Trained:
    """The trainable parameters of an optimizer.

    Args:
        params: what the optimizer was given.
        blocks: transformer blocks, as the user gave them.
        drop: the fraction of blocks left alone in a step; an attribute, too, as are the next two.
        rounding, backend: see `ZeroOrderOptimizer`.

    Attributes:
        module: the module that the optimizer was given; None if it was given parameters.
        weights: the tables; None while none are valid.
        builds: how often tables were built.
        steps: how many steps were taken with these tables.
        names, ids: of each parameter; its noise goes by the id.
        n_blocks, block_of: the transformer blocks, and which of them a parameter lies in.
        thresholds: of magnitude masks.
    """

    def __init__(
        self,
        params: Any,
        blocks: Sequence[nn.Module] | None,
        drop: float,
        rounding: str,
        backend: str | None,
        warner: Warner,
    ):
        self.module = params if isinstance(params, nn.Module) else None
        self._reshard = resharding(self.module)
        if self._reshard is not None:
            self._reshard()  # the parameters that FSDP shows now may be gathered ones, which it gives up later
        self._blocks, self.drop, self._warner = blocks, drop, warner
        self.rounding, self.backend = rounding, backend
        self.weights: Weights | None = None
        self._built_for: tuple[list[Any], int] | None = None
        self.builds = self.steps = 0
        self.names: dict[Tensor, str] = {}
        self.thresholds = Thresholds(warner)

    def parameters(self, params: Any) -> Any:
        """What `torch.optim.Optimizer` is to be given: the module's parameters by name, or what the user gave."""
        return params if self.module is None else list(self.module.named_parameters())

    def start(self, groups: Groups) -> None:
        """Take the first groups.

        Raises:
            TypeError, ValueError: blocks cannot be found, or cannot be dropped.
        """
        self._structure = None if self.module is None else Structure(self.module, every_parameter(groups))
        self.derive(groups)
        if self.drop and (reason := why_drop_is_useless(self.n_blocks, self.drop, self.block_of, trainable(groups))):
            self._warner.warn("drop", f"drop: {reason}")

    def derive(self, groups: Groups) -> None:
        """Derive from the module and the groups: names, noise ids, blocks, and what weight decay leaves alone."""
        now = {} if self.module is None else names.of_module(self.module)
        # A parameter keeps its name wherever it is moved to: its noise goes by it, and a trajectory.
        every = {p: self.names[p] for p in now if p in self.names}
        taken = set(every.values())
        for p, name in [*now.items(), *self.names.items()]:
            if p not in every:
                every[p] = names.free(name, taken)
        for group in groups:
            names.add_group(every, group)
        ids = names.param_ids(every.values())
        found = resolve_blocks(self.module, self._blocks, self.drop)
        self.names, self.ids = every, {p: ids[name] for p, name in every.items()}
        self._norms = norm_parameters(self.module)
        self.n_blocks, self.block_of = len(found), block_of_parameters(found)

    def name(self, group: dict[str, Any], where: str, in_forward: bool) -> None:
        """Name the parameters of a new group as the module does. In the forward they must be the module's."""
        if self.module is not None:
            name_group(group, self.module, self.names)
            if in_forward:
                check_owned(group, self.module, where)

    def follow(self, groups: Groups) -> bool:
        """Follow changes of the module: parameters and modules that came, went or were replaced.

        Returns:
            Whether parameters have other names, ids or blocks now, so that the tables are no longer valid.

        Raises:
            ValueError: the module lost parameters that are trained, or has new ones that are not; nothing is changed.
        """
        structure = self._structure
        if structure is None or not structure.changed(lambda: every_parameter(groups)):
            return False
        if self._reshard is not None:
            self._reshard()  # parameters that FSDP has gathered are no others
            if not structure.changed(lambda: every_parameter(groups)):
                return False
        parameters = every_parameter(groups)
        structure.check(parameters)
        before = [self._derived(p) for p in parameters]
        self.derive(groups)
        structure.look(parameters)
        if before == [self._derived(p) for p in parameters]:
            return False
        self.weights = None
        return True

    def _derived(self, p: Tensor) -> tuple[Any, ...]:
        return self.names[p], self.ids[p], self.block_of.get(p), p in self._norms

    def current(self, groups: Groups) -> Weights | None:
        """The tables, if they are valid: no parameter was frozen, unfrozen, moved, cast or added since they were built.

        Raises:
            TypeError, ValueError: before the first build, a parameter cannot be trained.
        """
        parameters = trainable(groups)
        here = [*map(local, parameters)]
        stale = self.thresholds.forget_stale(groups, self.names)
        if self.weights is not None and not stale and _signature(parameters, here, groups) == self._built_for:
            return self.weights
        if self._built_for is None:
            if reason := cannot_be_trained(self.module, [(self.names[p], p) for p in parameters]):
                raise ValueError(reason)
            for p, t in zip(parameters, here, strict=True):
                checks.weight(self.names[p], t)
        return None

    def are_others(self, groups: Groups) -> bool:
        """Whether other memory is trained than that which tables were built for before."""
        parameters = trainable(groups)
        now = _signature(parameters, [*map(local, parameters)], groups)
        return self._built_for is not None and self._built_for[0] != now[0]

    def find(self, groups: Groups) -> list[Weight]:
        """Each trainable parameter, and how passes treat it.

        Raises:
            ValueError: there are none, or ε is too large for their dtype.
        """
        found = []
        for g, group in enumerate(groups):
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                name = self.names[p]
                exempt = p in self._norms or p.dim() < 2
                row = 2 * g + int(exempt and not group["decay_all"])
                shard = shard_of(name, p)
                threshold = self.thresholds.take(p, shard, group["sparsity"])
                found.append(Weight(name, p, shard, self.ids[p], row, self.block_of.get(p), threshold))
        if not found:
            raise ValueError(
                "params: expected at least one parameter that requires grad, got none; if they were frozen since the "
                "optimizer was made (as peft does when it adds an adapter), make it afterwards"
            )
        self.thresholds.name_dense(found, groups)
        reach = Reach.of({w.tensor.dtype for w in found})
        for group in groups:
            reach.check_eps(check_eps("eps", group["eps"]))
        return found

    def build(
        self,
        found: Sequence[Weight],
        groups: Groups,
        anchors: Sequence[Tensor] | None,
        *,
        keep_masks: bool,
        copied_to: device | None,
    ) -> Weights:
        """New tables, for `use`. Until then there are none: an exception from outside may come at any line."""
        self.weights = None
        self.builds += 1
        rows, stochastic = 2 * len(groups), self.rounding != "nearest"
        return Weights(found, rows, stochastic, anchors, keep_masks, self.backend, self._reshard, copied_to)

    def use(self, weights: Weights, groups: Groups) -> None:
        """Tables are valid from now on, for as long as parameters are what they are."""
        parameters = [w.parameter for w in weights.weights]
        self._built_for, self.steps = _signature(parameters, [*map(local, parameters)], groups), 0
        self.weights = weights

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None, "_built_for": None}  # tables hold addresses: a copy builds its own


def _signature(parameters: Sequence[Tensor], here: Sequence[Tensor], groups: Groups) -> tuple[list[Any], int]:
    """What tables are valid for: parameters, and what of each is here."""
    # In every step, of hundreds of tensors: lists are made and compared faster than a tuple for each.
    memory = [*map(Tensor.data_ptr, here)], [*map(Tensor.numel, here)], layouts(here)
    return [[*map(id, parameters)], *memory, [p.dtype for p in parameters]], len(groups)
