"""Which module needs which weights while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn


class Owners:
    """The modules of a tree, and the indices of the weights that each must be given when it runs.

    Args:
        module: the root.
        weights: that may be parameters of its modules.
        bytes_for: how much memory copies of some of them take.

    Attributes:
        members: all modules of the tree.
        owned: for each module that has weights of its own, or borrows some, these.
        ran: modules that were seen to run.
        version: another one whenever the modules, or their parameters, are found to be others.
    """

    version = 0

    def __init__(self, module: nn.Module, weights: Sequence[Tensor], bytes_for: Callable[[frozenset[int]], int]):
        self._module, self._bytes_for = module, bytes_for
        self._index = {id(t): i for i, t in enumerate(weights)}
        self._borrowed: dict[nn.Module, set[int]] = {}
        self._together: dict[nn.Module, frozenset[int]] | None = None
        # The modules and their parameters as they were met, by their ids: `members` and whoever made the weights keep
        # all that count alive.
        self._seen: list[int] = []
        self.members: set[nn.Module] = set()
        self.owned: dict[nn.Module, frozenset[int]] = {}
        self.ran: set[nn.Module] = set()
        self._parted: set[nn.Module] = set()  # modules that were seen to run without all that is within them

    def knows(self, t: Tensor) -> bool:
        """Whether it is one of the weights."""
        return id(t) in self._index

    def borrow(self, module: nn.Module, i: int) -> None:
        """From now on a module needs weight i, too, which it was found to read without owning it."""
        self._borrowed.setdefault(module, set()).add(i)
        self._find_again()

    def find(self) -> None:
        """Look again: modules may have been put in the place of others."""
        members, todo, seen = {self._module}, [self._module], list[int]()
        while todo:  # as `modules()`, in a third of its time
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
            self._seen = seen  # last: an interrupt may come at any line

    def _find_again(self) -> None:
        owned = {m: set(indices) for m, indices in self._borrowed.items()}
        for m in self.members:
            for p in m._parameters.values():
                if (i := self._index.get(id(p))) is not None:
                    owned.setdefault(m, set()).add(i)
        self.owned = {m: frozenset(indices) for m, indices in owned.items()}
        self._together = None

    def saw(self, ran: Iterable[nn.Module]) -> None:
        """These have run, in one evaluation."""
        now, whole = self.members.intersection(ran), dict[nn.Module, bool]()
        self.ran |= now
        self._parted.update(m for m in now if not self._is_whole(m, now, whole))
        self._together = None

    def _is_whole(self, m: nn.Module, ran: set[nn.Module], known: dict[nn.Module, bool]) -> bool:
        """Whether a module ran, and all within it."""
        if m not in known:
            known[m] = True  # should it lie within itself
            known[m] = (m in ran or m not in self.owned) and all(self._is_whole(c, ran, known) for c in m.children())
        return known[m]

    @property
    def together(self) -> Mapping[nn.Module, frozenset[int]]:
        """As `owned`, but with the weights of all modules within, as far up as they take no more memory than those of
        the largest owner that runs do. Only modules that were seen to run, always with all that is within them: an
        expert that few tokens reach should cost nothing where it is not run.
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
        """The weights of a module and of all within it; None if they take too much, or one of them did not run."""
        if m not in known:
            known[m] = None  # should it lie within itself
            parts = [self._within(child, room, known) for child in m.children()]
            own = self.owned.get(m, frozenset())
            if (m in self.ran or not own) and m not in self._parted and None not in parts:
                every = own.union(*(part for part in parts if part is not None))
                known[m] = every if self._bytes_for(every) <= room else None
        return known[m]
