"""Which module needs which weights while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn


class Owners:
    """The modules of a tree, and the weights (by index) that each of them must be given when it runs.

    A module owns the weights that are its own parameters. It borrows those that it was found to read without owning.

    Args:
        module: the root.
        weights: the trained weights.
        bytes_for: the memory that copies of some weights take.

    Attributes:
        members: all modules of the tree.
        owned: the weights that each module owns or borrows; modules without any are left out.
        ran: modules that were seen to run.
        version: changes whenever `find` finds other modules or parameters.
    """

    version = 0

    def __init__(self, module: nn.Module, weights: Sequence[Tensor], bytes_for: Callable[[frozenset[int]], int]):
        self._module, self._bytes_for = module, bytes_for
        self._index = {id(t): i for i, t in enumerate(weights)}
        self._borrowed: dict[nn.Module, set[int]] = {}
        self._together: dict[nn.Module, frozenset[int]] | None = None
        # Ids of the modules and parameters as `find` met them. They stay valid: `members` and the optimizer keep alive
        # all that matter.
        self._seen: list[int] = []
        self.members: set[nn.Module] = set()
        self.owned: dict[nn.Module, frozenset[int]] = {}
        self.ran: set[nn.Module] = set()
        self._parted: set[nn.Module] = set()  # modules that were seen to run without all of their submodules

    def knows(self, t: Tensor) -> bool:
        """Whether a tensor is one of the weights."""
        return id(t) in self._index

    def borrow(self, module: nn.Module, i: int) -> None:
        """From now on give a module weight i, too, which it was found to read without owning it."""
        self._borrowed.setdefault(module, set()).add(i)
        self._find_again()

    def find(self) -> None:
        """Search the tree again, since modules may have been replaced."""
        members, todo, seen = {self._module}, [self._module], list[int]()
        while todo:  # what `modules()` does, in a third of the time
            m = todo.pop()
            seen.append(id(m))
            if m._parameters:
                seen.extend(map(id, m._parameters.values()))
            for child in m._modules.values():
                if child is not None and child not in members:
                    members.add(child)
                    todo.append(child)
        if seen != self._seen:
            self.members = members
            self._find_again()
            self.version += 1
            self._seen = seen  # last, since an interrupt may come at any line

    def _find_again(self) -> None:
        owned = {m: set(indices) for m, indices in self._borrowed.items()}
        for m in self.members:
            for p in m._parameters.values():
                if (i := self._index.get(id(p))) is not None:
                    owned.setdefault(m, set()).add(i)
        self.owned = {m: frozenset(indices) for m, indices in owned.items()}
        self._together = None

    def saw(self, ran: Iterable[nn.Module]) -> None:
        """Note the modules that have run in one evaluation."""
        now, whole = self.members.intersection(ran), dict[nn.Module, bool]()
        self.ran |= now
        self._parted.update(m for m in now if not self._is_whole(m, now, whole))
        self._together = None

    def _is_whole(self, m: nn.Module, ran: set[nn.Module], known: dict[nn.Module, bool]) -> bool:
        """Whether a module and all of its submodules ran."""
        if m not in known:
            known[m] = True  # in case it contains itself
            known[m] = (m in ran or m not in self.owned) and all(self._is_whole(c, ran, known) for c in m.children())
        return known[m]

    @property
    def together(self) -> Mapping[nn.Module, frozenset[int]]:
        """As `owned`, but each module also gets the weights of its submodules, if they fit.

        They fit if together they take no more memory than the largest owner that runs. Only modules that were seen to
        run, and always with all of their submodules, are grouped so: an expert that few tokens reach should cost
        nothing when it does not run.
        """
        if self._together is None:
            self.ran &= self.members
            self._parted &= self.members
            within: dict[nn.Module, frozenset[int] | None] = {}
            room = max((self._bytes_for(indices) for m, indices in self.owned.items() if m in self.ran), default=0)
            every = {m: self._within(m, room, within) for m in self.members if m in self.ran}
            self._together = {**self.owned, **{m: indices for m, indices in every.items() if indices}}
        return self._together

    def _within(self, m: nn.Module, room: int, known: dict[nn.Module, frozenset[int] | None]) -> frozenset[int] | None:
        """The weights of a module and its submodules; None if they take more than `room`, or if a part did not run."""
        if m not in known:
            known[m] = None  # in case it contains itself
            parts = [self._within(child, room, known) for child in m.children()]
            own = self.owned.get(m, frozenset())
            if (m in self.ran or not own) and m not in self._parted and None not in parts:
                every = own.union(*(part for part in parts if part is not None))
                known[m] = every if self._bytes_for(every) <= room else None
        return known[m]
