"""The trained parameters of an optimizer: names, noise ids, blocks, thresholds, and whether their tables are valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, device, nn

from .. import checks, names
from ..layouts import layouts
from ..trajectory.setups import MASKS
from ..warn import Warner
from . import kept
from .blocks import block_of_parameters, why_drop_is_useless
from .groups import check_eps, check_owned, name_group, norm_parameters, resolve_blocks
from .masks import Thresholds
from .overflow import Reach
from .shards import cannot_be_trained, local, resharding, shard_of
from .structure import Structure
from .tables import Weight, Weights

Groups = Sequence[Mapping[str, Any]]  # torch.optim's parameter groups


def every_parameter(groups: Groups) -> list[Tensor]:
    """Return the parameters of all groups, frozen ones too."""
    return [p for group in groups for p in group["params"]]


def trainable(groups: Groups) -> list[Tensor]:
    """Return the parameters that require grad."""
    return [p for group in groups for p in group["params"] if p.requires_grad]


class Trained:
    """Knows the trained parameters of an optimizer, and builds their tables.

    Args:
        params: what the optimizer was given.
        blocks: transformer blocks, as the user gave them.
        drop: the fraction of blocks that a step leaves alone.
        rounding, distribution, mask, backend: see `ZeroOrderOptimizer`.

    Attributes:
        module: the module that the optimizer was given; None if it was given parameters.
        drop, rounding, distribution, mask, backend: as given, or as a loaded state or a resumed run has them.
        weights: the tables; None if there are none, or they are no longer valid.
        builds: how often tables were built.
        steps: how many steps were taken with the current tables.
        names, ids: the name of each parameter, and the id that its noise depends on.
        n_blocks: how many transformer blocks there are.
        block_of: the index of the block that a parameter lies in.
        thresholds: of magnitude masks.
        started: whether the first parameter groups are known.
    """

    started = False

    def __init__(
        self,
        params: Any,
        blocks: Sequence[nn.Module] | None,
        drop: float,
        rounding: str,
        distribution: str,
        mask: str,
        backend: str | None,
        warner: Warner,
    ):
        self.module = params if isinstance(params, nn.Module) else None
        self._reshard = resharding(self.module)
        if self._reshard is not None:
            self._reshard()  # between forwards FSDP may show gathered parameters, which it frees later
        self._blocks, self.drop, self._warner = blocks, drop, warner
        self.rounding, self.distribution, self.backend = rounding, distribution, backend
        self.mask = checks.choice("mask", mask, MASKS)
        self.weights: Weights | None = None
        self._built_for: tuple[list[Any], int] | None = None
        self.builds = self.steps = 0
        self.names: dict[Tensor, str] = {}
        self.thresholds = Thresholds(warner)

    def parameters(self, params: Any) -> Any:
        """Return what to pass to `torch.optim.Optimizer`: the module's named parameters, or what the user gave."""
        return params if self.module is None else list(self.module.named_parameters())

    def start(self, groups: Groups) -> None:
        """Derive names and blocks from the first parameter groups.

        Raises:
            TypeError, ValueError: blocks cannot be found, or cannot be dropped.
        """
        self._structure = None if self.module is None else Structure(self.module, every_parameter(groups))
        self.derive(groups)
        self.started = True
        if self.drop and (reason := why_drop_is_useless(self.n_blocks, self.drop, self.block_of, trainable(groups))):
            self._warner.warn("drop", f"drop: {reason}")

    def derive(self, groups: Groups) -> None:
        """Derive names, noise ids, blocks and parameters without weight decay from the module and the groups."""
        now = {} if self.module is None else names.of_module(self.module)
        # A parameter keeps its name when it moves within the module: noise and trajectory depend on the name.
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
        """Name the parameters of a new group as the module does.

        Raises:
            ValueError: perturbation is in the forward, and a parameter is not the module's.
        """
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
            self._reshard()  # gathered parameters are the same weights, not changed ones
            if not structure.changed(lambda: every_parameter(groups)):
                return False
        parameters = every_parameter(groups)
        structure.check(parameters)
        before = [self._derived(p) for p in parameters]
        self.derive(groups)
        structure.remember(parameters)
        if before == [self._derived(p) for p in parameters]:
            return False
        self.weights = None
        return True

    def _derived(self, p: Tensor) -> tuple[Any, ...]:
        return self.names[p], self.ids[p], self.block_of.get(p), p in self._norms

    def current(self, groups: Groups) -> Weights | None:
        """Return the tables, or None if a parameter was frozen, unfrozen, moved, cast or added since they were built.

        Raises:
            TypeError, ValueError: a parameter cannot be trained. Only checked before the first build.
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

    def trains_other_memory(self, groups: Groups) -> bool:
        """Say whether the last tables were built for other parameters or other memory."""
        parameters = trainable(groups)
        now = _signature(parameters, [*map(local, parameters)], groups)
        return self._built_for is not None and self._built_for[0] != now[0]

    def find(self, groups: Groups) -> list[Weight]:
        """Return a `Weight` for each trainable parameter.

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
        kept_bits: kept.Kept,
        *,
        keep_masks: bool,
        copied_to: device | None,
    ) -> Weights:
        """Build new tables, to be passed to `use`.

        Until then `weights` is None, since an exception from outside may come at any line.

        Args:
            kept_bits: the optimizer's state, which holds masks that stay for the run.
        """
        self.weights = None
        self.builds += 1
        masks = None
        if self.mask == "kept":
            masks = kept.bits_of_run(found, kept_bits, self.thresholds.fixed)
        else:
            kept.forget(kept_bits)
        return Weights(
            found,
            2 * len(groups),
            self.rounding != "nearest",
            self.distribution,
            anchors,
            keep_masks,
            self.backend,
            self._reshard,
            copied_to,
            masks,
        )

    def use(self, weights: Weights, groups: Groups) -> None:
        """Use these tables from now on, until a parameter changes."""
        parameters = [w.parameter for w in weights.weights]
        self._built_for, self.steps = _signature(parameters, [*map(local, parameters)], groups), 0
        self.weights = weights

    def begin_step(self, weights: Weights, groups: Groups, step: int, changed: bool) -> None:
        """Fix thresholds and masks before a step; see `Thresholds.begin_step`."""
        stay = self.mask == "kept"
        if stay and not self.thresholds.fixed:
            kept.record_all(weights)
        self.thresholds.begin_step(weights, groups, step, changed, count=not stay)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None, "_built_for": None}  # tables hold addresses, so a copy builds its own


def _signature(parameters: Sequence[Tensor], here: Sequence[Tensor], groups: Groups) -> tuple[list[Any], int]:
    """Return what tables depend on: which parameters there are, and the memory of their elements here."""
    # This runs in every step, for hundreds of tensors. A few lists are faster than a tuple for each tensor.
    memory = [*map(Tensor.data_ptr, here)], [*map(Tensor.numel, here)], layouts(here)
    return [[*map(id, parameters)], *memory, [p.dtype for p in parameters]], len(groups)
