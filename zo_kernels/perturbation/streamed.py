"""Perturbation in the forward of weights that are elsewhere, such as on a CPU whose memory holds what a GPU's does not.

Just before a module runs, all its tensors are copied to where it runs, and the trained ones are perturbed there; the
next module's are on their way meanwhile. Nothing comes back: θ stays where it is, and is updated there.
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
    """What a module needs that is not there yet: indices of weights, and of tensors that are not trained."""

    module: nn.Module
    wanted: tuple[int, ...]
    others: tuple[int, ...]


class StreamedEngine(Engine):
    """As `Engine`, on another device than that of the weights.

    Args:
        module, weights: see `Engine`.
        where: the device that modules run on. What is trained may be on any one device; what is not trained is copied
            from where it is, and stays where it is if that is the same device, unless the weights are on it, too.
    """

    _notes_all = True  # in their order

    def __init__(self, module: nn.Module, weights: Weights, where: device):
        self._where = where
        self._others: list[Tensor] = []  # as the module has them, and
        self._origins: list[Tensor] = []  # as they are when no module runs
        self._needs: dict[nn.Module, list[int]] = {}  # of `_others`, by index
        self._lent: dict[nn.Module, list[Tensor]] = {}  # of them, where modules read them that do not own them
        self._here: set[int] = set()  # of them, by index
        self._order: list[_Load] = []  # of this evaluation so far
        self._expected: list[_Load] = []  # of the one before
        self._coming: tuple[_Load, int, list[Tensor]] | None = None
        super().__init__(module, weights)

    @property
    def bytes_copied(self) -> int:
        """To the device, in all evaluations so far."""
        return int(self._scratch.bytes_copied)

    @property
    def bytes_on_device(self) -> int:
        """Of the memory for weights there."""
        return sum(chunk.numel() for chunk in self._scratch.chunks)

    def _make_room(self, like: Tensor) -> Any:
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

    def _find_wanted(self, watch: bool) -> None:
        """Each module is given its own tensors, those that take no part in the pass, too."""
        self._wanted = {**dict.fromkeys(self._needs, frozenset[int]()), **self._owners.owned}

    def _watched(self) -> list[Tensor]:
        return [*self._weights.theta, *self._origins]

    def _sealed(self) -> None:
        """All: where they are, nobody computes with them."""

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
                    "closure: a module that is made anew in every call reads a tensor that is not trained, of shape "
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
        """Modules run on copies of their tensors as they are."""
        self._pass, self._from_anchor, self._active = None, False, None
        self._find_owners()
        self._find_wanted(watch=False)
        with self._hooked():
            yield

    def restore(self) -> None:
        self._coming = None  # before its slot is given back
        super().restore()

    def _load(self, module: nn.Module) -> _Load:
        """What the module would have to be given now."""
        wanted = tuple(i for i in sorted(self._owners.owned.get(module, ())) if i not in self._live)
        return _Load(module, wanted, tuple(i for i in self._needs.get(module, ()) if i not in self._here))

    def _sources(self, load: _Load) -> list[Tensor]:
        """What is copied: weights, what is not trained, and the masks that the weights' tables keep."""
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
        made = self._made
        self._perturb_copies(load, frame.place, copies)
        frame.swapped = load.wanted
        frame.originals = [(self._tensors[i], self._weights.theta[i]) for i in load.wanted]
        frame.others = [self._others[i] for i in load.others]
        self._seals.unseal(load.wanted)
        for i, copy in zip(load.wanted, copies, strict=False):
            self._tensors[i].data = copy
        for t, copy in zip(frame.others, copies[len(load.wanted) :], strict=False):
            t.data = copy
        if made == self._made:
            frame.references = self._scratch.references_before(frame.place) + len(load.wanted), made
        self._live.update(load.wanted)
        self._here.update(load.others)
        self._send_for_next(load)

    def _send_for_next(self, load: _Load) -> None:
        """If this evaluation goes as the one before, the next module's tensors can set out."""
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
            self._made += 1
            self._tables[key] = Table(entries, names, weights.backend, private=True, staging=weights.staging)
        self._tables[key].apply(do)

    def _put_back(self) -> Frame:
        frame = self._frames[-1]
        for t in frame.others:
            i = self._place_of[t]
            t.data = self._origins[i]
            self._here.discard(i)
        return super()._put_back()


class Streamed(InForward):
    """The place of `execution_device=`: as `InForward`, with weights that are copied to where their module runs.

    Attributes:
        streaming: see `engine`, which it is.
    """

    def __init__(self, engine: StreamedEngine, weights: Weights, warner: Warner):
        super().__init__(engine, weights, warner)
        self.streaming = engine

    def unperturbed(self) -> AbstractContextManager[None]:
        return self.streaming.unperturbed()


def settle(module: nn.Module, where: device) -> None:
    """Move the module's buffers to where it runs, since forwards may change them, and put its parameters that are on a
    CPU into pinned memory, from which a GPU copies beside its work. What is there already stays where it is.
    """
    for b in module.buffers():
        b.data = b.data.to(where)
    pin(module.parameters(), where)


def bytes_on_device(module: nn.Module) -> int:
    """What `execution_device` needs there for the module's parameters: those of the largest of its modules twice, of
    the one that runs and of the next. Where modules with parameters of their own run others within them, it is so much
    for each one more; modules that read others' parameters need room for these, too.
    """
    return 2 * max(bytes_for(list(m.parameters(recurse=False))) for m in module.modules())
