"""Perturbation in the forward: a module runs on perturbed copies of its weights, and θ itself is never written.

Just before a module runs, its weights' perturbed values are written to a scratch buffer by one pass, which serves all
modules within it if there is room, and its parameters' `data` points there until its forward ends, however it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ..backends.types import MaskKind, Pass
from ..closures.losses import call
from ..modes import remove_forward_hooks
from ..names import listed
from ..ops import Table
from ..weights.tables import Weights
from .owners import Owners
from .reads.watch import Reads, Watch, check_reachable
from .reads.watch_policy import WatchPolicy
from .scratch import Scratch, bytes_for, without_aliases


@dataclass(slots=True)
class Frame:
    """A module that runs, and what stands in for its weights."""

    module: nn.Module
    swapped: Iterable[int] = ()  # weights, by index
    originals: Sequence[tuple[Tensor, Tensor]] = ()  # (weight, its θ)
    place: Any = None  # of what stands in for them
    others: Sequence[Tensor] = ()  # what is not trained, and was moved here too
    references: tuple[int, int] | None = None  # to the buffer, when they stood in, of which these by as many tables


@dataclass(frozen=True, slots=True)
class Copies:
    """Perturbed copies of weights at a place in the buffer, and the table that writes them."""

    table: Table
    copies: list[tuple[Tensor, Tensor]]  # (weight, its copy)
    originals: list[tuple[Tensor, Tensor]]  # (weight, its θ)


class Engine:
    """Evaluates closures at perturbed weights, for as long as the tables of the weights are valid.

    Args:
        module: whose modules' own parameters the weights are.
        weights: the tables. Nothing here writes to them.

    Attributes:
        watch_policy: when evaluations are watched.

    Raises:
        ValueError: a weight is no module's own.
    """

    _notes_all = False  # whether there is a frame also for modules that need nothing

    def __init__(self, module: nn.Module, weights: Weights):
        self._module, self._weights = module, weights
        self._tensors = [w.tensor for w in weights.weights]
        self._owners = Owners(module, self._tensors, self._bytes_for)
        self.watch_policy = WatchPolicy(self._tensors, weights.theta, self._owners)
        self._seals = self.watch_policy.seals
        self._wanted: Mapping[nn.Module, frozenset[int]] = {}  # what each module is to be given in this evaluation
        self._tables: dict[tuple[Any, ...], Any] = {}
        self._ready: dict[nn.Module, Copies] = {}  # of those tables, what a module needs where nothing is perturbed yet
        self._ready_for: Any = None
        self._made = 0  # tables
        self._sizes: dict[frozenset[int], int] = {}
        self._scratch: Any = self._make_room(weights.weights[0].tensor)
        self._hooks: list[RemovableHandle] = []
        self._hooking = False
        self._frames: list[Frame] = []
        self._live: set[int] = set()
        self._ran: list[nn.Module] = []  # all modules that ran in this evaluation
        self._stack: list[nn.Module] = []  # all modules that run, while watching
        self._watch: Watch | None = None
        self._thread, self._is_elsewhere = 0, False  # where an evaluation was begun, and whether modules run in others
        self._pass: Pass | None = None
        self._from_anchor = False
        self._active: frozenset[int] | None = None
        self._entered = False
        self._find_owners()
        orphans = set(range(len(weights.weights))).difference(*self._owners.owned.values())
        if orphans:
            raise ValueError(
                f"params: expected parameters of the module, for perturb='in_forward', got also {self._named(orphans)}"
            )

    def _make_room(self, like: Tensor) -> Any:
        """Memory for what stands in for a running module's weights."""
        return Scratch(like.device, like.is_inference(), self._forget_tables)

    def _forget_tables(self) -> None:
        self._tables.clear()
        self._ready.clear()

    def _find_owners(self) -> None:
        self._owners.find()

    def _bytes_for(self, indices: frozenset[int]) -> int:
        if (size := self._sizes.get(indices)) is None:
            size = self._sizes[indices] = bytes_for([self._weights.theta[i] for i in indices])
        return size

    def _find_wanted(self, watch: bool) -> None:
        """Where reads are watched, each owner is given its own weights alone."""
        wanted: Mapping[nn.Module, frozenset[int]] = self._owners.owned if watch else self._owners.together
        if (active := self._active) is not None:
            # A module with several blocks of which some are dropped would need a table for each choice of them.
            owned, none = self._owners.owned, frozenset[int]()
            wanted = {m: w if w <= active else owned.get(m, none) & active for m, w in wanted.items()}
        self._wanted = wanted
        if self._ready_for != (wanted, self._from_anchor):
            self._ready.clear()
            self._ready_for = wanted, self._from_anchor

    def evaluate(
        self,
        closure: Callable[[], Any],
        do: Pass,
        *,
        step: int,
        from_anchor: bool = False,
        watch: bool = False,
        missed: Callable[[str], None] = lambda names: None,
    ) -> Any:
        """What the closure returns while every module runs on the weights that the pass would write.

        Args:
            closure: runs the module; called once, or again if there are signs that weights are read outside of their
                module, and again if they are.
            do: the pass. Weights that are not active are not perturbed.
            step: which it is for.
            from_anchor: perturb the anchors instead of θ.
            watch: look for such reads even if nothing points to them. It slows the evaluation down, and changes nothing
                in its result.
            missed: told of the weights that were found so, and may have been read in earlier evaluations.

        Raises:
            ValueError: weights are read where no module runs, or none of the modules ran.
        """
        self._pass, self._from_anchor = replace(do, active=None), from_anchor
        self._active = None if do.active is None else frozenset(do.active)
        watch_policy, strangers = self.watch_policy, set[int]()
        self._find_owners()
        certain = watch_policy.must_watch()
        watching, again = certain or watch or watch_policy.should_watch(), False
        while True:
            found: Reads = set()
            result, signs = self._run(closure, found if watching else None)
            if watching and self._is_elsewhere:
                result = self._run_elsewhere(closure)
            if not found and (watching or not signs):
                break
            if self._is_being_captured():
                raise ValueError(
                    "graphed: expected a closure that does what it did in the steps before, but while it is captured "
                    "it reads weights outside of their module, or may do so; use opt.step"
                )
            if not watching:
                watching = certain = again = True
            else:
                if not certain and not self._has_signs(closure):
                    missed(self._named(i for i, _ in found if i is not None))
                self._borrow(found, strangers)
                certain, again = True, False
            self._find_owners()
        watch_policy.learn(self._ran, step, again) if watching else watch_policy.skip(step)
        if not self._entered:
            raise ValueError(
                "closure: expected it to run the module that the optimizer was given, but none of the modules with "
                "trainable parameters ran; if it runs them compiled or by other means, use perturb='in_place'"
            )
        return result

    def _is_being_captured(self) -> bool:
        return self._tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()

    def _run(self, closure: Callable[[], Any], found: Reads | None) -> tuple[Any, bool]:
        """Evaluate once.

        Args:
            found: what is read where it is not perturbed is added to it; None not to watch.

        Returns:
            What the closure returns, and whether something points to such reads.
        """
        self._find_wanted(watch=found is not None)
        self.watch_policy.begin()
        self._watch, self._seals.on_address, result = None, None, None
        sealed = self._sealed()
        if found is not None:
            self._thread, self._is_elsewhere = get_ident(), False
            self._seals.on_address = on_read = lambda i: self._note_read(i, found)
            self._watch = Watch(self._watched(), self._scratch.is_free, on_read, self.watch_policy.wrote.add)
            sealed = sealed if self.watch_policy.may_seal else []
        try:
            with self._hooked(), self._watch.watching() if self._watch else nullcontext(), self._seals.of(sealed):
                result = call(closure)
        except RuntimeError:  # as an operation does that reads weights on two devices
            if not (found or self._seals.broken):
                raise
        if found is not None:
            self._owners.saw(self._ran)
        return result, self.watch_policy.saw_signs(self._ran)

    def _run_elsewhere(self, closure: Callable[[], Any]) -> Any:
        """Evaluate a closure that runs modules in another thread, whose operations nobody can watch."""
        result, _ = self._run(closure, None)
        if self._seals.broken:
            raise ValueError(
                "closure: it uses weights outside of their module in another thread than that of the step, where "
                "perturbation in the forward cannot see what it does; use perturb='in_place'"
            )
        return result

    def _has_signs(self, closure: Callable[[], Any]) -> bool:
        """Whether a read that was found would have been noticed in evaluations that were not watched."""
        try:
            return self._run(closure, None)[1]
        except Exception:  # as they would have ended
            return True

    def _sealed(self) -> Iterable[int] | None:
        """Weights that only their modules may read; all, if None. Those that are not perturbed anyone may."""
        return self._active

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        self._entered = False
        self._ran.clear()
        try:
            self._hooking = True
            self._hooks.append(register_module_forward_pre_hook(self._enter))
            self._hooks.append(register_module_forward_hook(self._leave, always_call=True))
            self._hooking = False
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Leave nothing behind of an evaluation. To be called again should an exception from outside cut it short."""
        if self._hooking:  # PyTorch may have taken one whose handle never came
            remove_forward_hooks(self._enter, self._leave)
            self._hooking = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seals.unseal_all()
        while self._frames:  # left over by what is no Exception
            self._put_back()
        self._scratch.clear()
        self._stack.clear()
        if (watch := self._watch) is not None:
            watch.leave()
        self._watch = None

    def is_still(self) -> bool:
        """Whether no module was left in the middle of its forward."""
        return not self._frames

    def memory_in_use(self) -> list[Any]:
        """What the passes read and write besides θ: it may be replaced by other memory in later evaluations."""
        return [*self._tables.values(), *self._scratch.chunks]

    def _watched(self) -> list[Tensor]:
        """What nobody may read but in its module's forward; the weights come first."""
        return self._weights.theta

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._ran.append(module)
        if self._watch is not None:
            self._stack.append(module)
            self._is_elsewhere |= get_ident() != self._thread
        wanted = self._wanted.get(module)
        if wanted is None:
            return
        if not self._entered:
            self._entered = module in self._owners.owned
        # All of it is perturbed already? But a module that runs within itself is to end by itself.
        if wanted <= self._live and not self._notes_all and not self._has_frame(module):
            return
        frame = Frame(module)
        self._frames.append(frame)  # first: an interrupt may come at any line
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or torch.is_grad_enabled():  # a backward pass may follow
            self.watch_policy.suspicious = True
        if self._watch is None and not transformed:
            self._swap(frame, wanted)
            return
        # A transform of torch.func that is under way is none of our passes' business.
        with nullcontext() if self._watch is None else self._watch.paused(), torch._C._DisableFuncTorch():
            self._swap(frame, wanted)

    def _has_frame(self, module: nn.Module) -> bool:
        for frame in self._frames:  # noqa: SIM110 - `any` takes three times as long, for every module
            if frame.module is module:
                return True
        return False

    def _swap(self, frame: Frame, wanted: frozenset[int]) -> None:
        """Put perturbed copies in the place of weights."""
        first = not self._live
        missing = wanted if first else wanted - self._live
        if not first and not self._scratch.fits(self._bytes_for(missing)):  # without those within it, then
            missing = self._owners.owned.get(frame.module, frozenset()) & wanted - self._live
        if not missing:
            return
        frame.place = place = self._scratch.take(self._bytes_for(missing))
        found = self._ready.get(frame.module) if first else None  # what is taken first is always at the same place
        if found is None:
            key = (self._from_anchor, missing, place)
            if key not in self._tables:
                self._tables[key] = self._new_copies(missing, place)
            found = self._tables[key]
            if first:
                self._ready[frame.module] = found
        assert self._pass is not None
        found.table.apply(self._pass)
        frame.originals, frame.swapped = found.originals, missing
        self._seals.unseal(missing)
        for tensor, copy in found.copies:
            tensor.data = copy
        self._live.update(missing)
        frame.references = self._scratch.references(place), self._made

    def _new_copies(self, missing: frozenset[int], place: tuple[int, int]) -> Copies:
        weights, wanted = self._weights, sorted(missing)
        sources = weights.anchors if self._from_anchor else weights.theta
        assert sources is not None
        self._made += 1
        copies = self._scratch.tensors(place, [weights.theta[i] for i in wanted])
        kind = MaskKind.THRESHOLD if self._from_anchor else MaskKind.BITS
        entries = [weights.entry(i, c, sources[i], kind) for i, c in zip(wanted, copies, strict=True)]
        names = [weights.weights[i].name for i in wanted]
        return Copies(
            Table(entries, names, weights.backend, private=True, staging=weights.staging),
            [(self._tensors[i], copy) for i, copy in zip(wanted, copies, strict=True)],
            [(self._tensors[i], weights.theta[i]) for i in wanted],
        )

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._watch is not None and module in self._stack:
            while self._stack.pop() is not module:
                pass
        # Without a frame, its weights lie in the buffer for a module around it: soon for another one.
        if not self._has_frame(module):
            return without_aliases(output, self._scratch.holds) if module in self._owners.owned else None
        replaced = without_aliases(output, self._scratch.holds)
        while (frame := self._put_back()).module is not module:
            pass
        if replaced is None and frame.references is not None:
            # Its weights do not stand in any more. Who else does has kept something of the buffer.
            before, made = frame.references
            if made == self._made and self._scratch.references(frame.place) > before - len(frame.originals):
                self.watch_policy.suspicious = True
        return replaced

    def _put_back(self) -> Frame:
        """End the last frame, and return it."""
        frame = self._frames[-1]
        for tensor, theta in frame.originals:
            tensor.data = theta
        self._seals.seal(frame.swapped)
        self._live.difference_update(frame.swapped)
        if frame.place is not None:
            self._scratch.give_back(frame.place)
        self._frames.pop()
        return frame

    def _note_read(self, i: int | None, found: Reads) -> None:
        if i is None:
            found.add((None, None))
            return
        owned = self._owners.owned
        if self._active is not None and i not in self._active and any(i in owned.get(m, ()) for m in self._stack):
            return  # it is dropped, and belongs to a module that runs
        running: list[Any] = [m for m in self._stack if m in self._owners.members] or self._stack or [None]
        found.add((i, running[-1]))

    def _borrow(self, found: Reads, strangers: set[int]) -> None:
        """Perturb weights from now on where they were found to be read; see `check_reachable`."""
        for i, m in check_reachable(found, self._owners, strangers, self._named):
            self._owners.borrow(m, i)

    def _named(self, indices: Iterable[int]) -> str:
        return listed([self._weights.weights[i].name for i in sorted(set(indices))])
