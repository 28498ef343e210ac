"""Perturbation in the forward on another device than that of the weights, which need not fit there.

Just before a module runs, all its tensors are copied to that device, and the copies of trained ones are perturbed.
Meanwhile the next module's tensors are copied too. Nothing is copied back: θ is updated where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, device, nn

from ..backends.types import MaskKind
from ..ops import Table
from ..warn import Warner
from ..weights.pinned import pin
from ..weights.tables import Weights
from .engine import Engine, Frame
from .in_forward import InForward
from .reads.watch import Reads
from .scratch import bytes_for
from .slots import Slots


@dataclass(frozen=True, slots=True)
class _Load:
    """The tensors to copy for a module: indices of weights, and of tensors that are not trained."""

    module: nn.Module
    wanted: tuple[int, ...]
    others: tuple[int, ...]


class StreamedEngine(Engine):
    """An `Engine` whose modules run on another device than that of the weights.

    Args:
        module, weights: see `Engine`.
        where: the device that modules run on. The trained tensors may be on any one device. Other tensors are copied to
            `where`, too; those that are there already are only copied if the trained ones are also there.
    """

    _frame_for_all = True  # the order of all modules says what to copy next

    def __init__(self, module: nn.Module, weights: Weights, where: device):
        self._where = where
        self._others: list[Tensor] = []  # tensors that are not trained, as the module has them
        self._origins: list[Tensor] = []  # their data outside of evaluations
        self._needs: dict[nn.Module, list[int]] = {}  # indices into `_others`
        self._lent: dict[nn.Module, list[Tensor]] = {}  # tensors of `_others` that modules read without owning them
        self._here: set[int] = set()  # indices into `_others`: now copied to the device
        self._order: list[_Load] = []  # the loads of this evaluation so far
        self._expected: list[_Load] = []  # the loads of the evaluation before
        self._coming: tuple[_Load, int, list[Tensor]] | None = None  # the next module's load, its slot and copies
        super().__init__(module, weights)

    @property
    def bytes_copied(self) -> int:
        """How many bytes were copied to the device, in all evaluations so far."""
        return int(self._scratch.bytes_copied)

    @property
    def bytes_on_device(self) -> int:
        """How many bytes the device holds for copies."""
        return sum(chunk.numel() for chunk in self._scratch.chunks)

    def _new_scratch(self, like: Tensor) -> Any:
        return Slots(self._where, like.is_inference(), self._tables.clear)

    def _find_owners(self) -> None:
        super()._find_owners()
        everything = self._weights.theta[0].device == self._where
        places: dict[Tensor, int] = {}
        self._needs = {}
        for m in (*self._module.modules(), *(m for m in self._lent if m not in self._owners.members)):
            for t in (*m._parameters.values(), *self._lent.get(m, ())):
                if t is not None and not self._owners.knows(t) and (everything or t.device != self._where):
                    self._needs.setdefault(m, []).append(places.setdefault(t, len(places)))
        known = {origin.data_ptr() for origin in self._origins}
        pin([t for t in places if t.data_ptr() not in known], self._where)
        self._place_of = places
        self._others, self._origins = list(places), [t.detach() for t in places]
        every = self._owners.owned.keys() | self._needs.keys()
        self._scratch.reserve(max(bytes_for(self._sources(self._load(m))) for m in every))

    def _choose_wanted(self, watch: bool) -> None:
        """Give each module copies of all its tensors, also of those that the pass leaves alone."""
        self._wanted = {**dict.fromkeys(self._needs, frozenset[int]()), **self._owners.owned}

    def _tensors_to_watch(self) -> list[Tensor]:
        return [*self._weights.theta, *self._origins]

    def _weights_to_seal(self) -> None:
        """Return None, for all weights: nobody computes with them where they are."""

    def _borrow(self, found: Reads, strangers: set[int]) -> None:
        ours = len(self._weights.weights)
        for i, m in [(i, m) for i, m in found if i is not None and i >= ours]:
            found.remove((i, m))
            if m is None or i - ours in self._needs.get(m, ()):
                raise ValueError(
                    f"closure: where its module does not run, it reads a tensor that is not trained, of shape "
                    f"{tuple(self._others[i - ours].shape)}, or by a view from before; it is not on execution_device "
                    "then, so keep it there"
                )
            if m not in self._owners.members and i in strangers:
                raise ValueError(
                    "closure: a module that is created in every call reads a tensor that is not trained, of shape "
                    f"{tuple(self._others[i - ours].shape)}; keep such tensors on execution_device"
                )
            strangers.update([i] if m not in self._owners.members else [])
            self._lent.setdefault(m, []).append(self._others[i - ours])
        if found:
            super()._borrow(found, strangers)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        self._order, self._expected = [], self._order
        with super()._hooked():
            yield

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Within the block, modules run on copies of their tensors, without a perturbation."""
        self._pass, self._from_anchor, self._active = None, False, None
        self._find_owners()
        self._choose_wanted(watch=False)
        with self._hooked():
            yield

    def restore(self) -> None:
        self._coming = None  # first, since `restore` gives its slot back
        super().restore()

    def _load(self, module: nn.Module) -> _Load:
        """Return what must be copied for a module now."""
        wanted = tuple(i for i in sorted(self._owners.owned.get(module, ())) if i not in self._perturbed)
        return _Load(module, wanted, tuple(i for i in self._needs.get(module, ()) if i not in self._here))

    def _sources(self, load: _Load) -> list[Tensor]:
        """Return the tensors to copy: weights, tensors that are not trained, and the masks that tables keep."""
        weights = self._weights
        theta = weights.anchors if self._from_anchor else weights.theta
        assert theta is not None
        masks = [weights.bits(i) for i in load.wanted]
        return [
            *(theta[i] for i in load.wanted),
            *(self._origins[i] for i in load.others),
            *(bits for bits in masks if bits is not None),
        ]

    def _swap(self, frame: Frame, wanted: frozenset[int]) -> None:
        load = self._load(frame.module)
        self._order.append(load)
        if not load.wanted and not load.others:
            return
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == load:
            frame.place, copies = coming[1:]
        else:
            if coming is not None:
                self._scratch.discard(coming[1])
            frame.place, copies = self._scratch.fill(self._sources(load))
        self._scratch.arrived(frame.place)
        built = self._tables_built
        self._perturb_copies(load, frame.place, copies)
        frame.swapped = load.wanted
        frame.originals = [(self._tensors[i], self._weights.theta[i]) for i in load.wanted]
        frame.others = [self._others[i] for i in load.others]
        self._seals.unseal(load.wanted)
        for i, copy in zip(load.wanted, copies, strict=False):
            self._tensors[i].data = copy
        for t, copy in zip(frame.others, copies[len(load.wanted) :], strict=False):
            t.data = copy
        if built == self._tables_built:
            frame.references = self._scratch.references_before(frame.place) + len(load.wanted), built
        self._perturbed.update(load.wanted)
        self._here.update(load.others)
        self._send_for_next(load)

    def _send_for_next(self, load: _Load) -> None:
        """Start copying the next module's tensors, if modules run in the same order as in the evaluation before."""
        at = len(self._order)
        if at < len(self._expected) and self._expected[at - 1] == load:
            following = self._expected[at]
            if following.wanted or following.others:
                self._coming = following, *self._scratch.fill(self._sources(following))

    def _perturb_copies(self, load: _Load, number: int, copies: Sequence[Tensor]) -> None:
        active = tuple(i for i in load.wanted if self._active is None or i in self._active)
        do, weights = self._pass, self._weights
        if not active or do is None:
            return
        key = (self._from_anchor, active, load, number)
        if key not in self._tables:
            kind = MaskKind.THRESHOLD if self._from_anchor else MaskKind.BITS
            masks = iter(copies[len(load.wanted) + len(load.others) :])
            entries = []
            for i, copy in zip(load.wanted, copies, strict=False):
                mask = None if weights.bits(i) is None else next(masks)
                if i in active:
                    entries.append(replace(weights.entry(i, copy, copy, kind), mask_tensor=mask))
            names = [weights.weights[i].name for i in active]
            self._tables_built += 1
            self._tables[key] = Table(entries, names, weights.backend, private=True, staging=weights.staging)
        self._tables[key].apply(do)

    def _pop_frame(self) -> Frame:
        frame = self._frames[-1]
        for t in frame.others:
            i = self._place_of[t]
            t.data = self._origins[i]
            self._here.discard(i)
        return super()._pop_frame()


class Streamed(InForward):
    """The place of `execution_device=`: an `InForward` whose weights are copied to where their module runs.

    Attributes:
        streaming: the same object as `engine`, with its own type.
    """

    def __init__(self, engine: StreamedEngine, weights: Weights, warner: Warner):
        super().__init__(engine, weights, warner)
        self.streaming = engine

    def unperturbed(self) -> AbstractContextManager[None]:
        return self.streaming.unperturbed()


def settle(module: nn.Module, where: device) -> None:
    """Prepare a module to run on another device.

    Its buffers move there, since forwards may change them. Its parameters on the CPU move to pinned memory, from which
    a GPU copies while it works. Tensors that are there already stay where they are.
    """
    for b in module.buffers():
        b.data = b.data.to(where)
    pin(module.parameters(), where)


def bytes_on_device(module: nn.Module) -> int:
    """Return how many bytes `execution_device` needs for the parameters of a module.

    It is twice the largest module's own parameters: for the module that runs, and for the next. Each module that has
    own parameters and runs others within it needs as much again; modules that read others' parameters need room for
    these too.
    """
    return 2 * max(bytes_for(list(m.parameters(recurse=False))) for m in module.modules())
