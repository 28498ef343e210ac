"""The engine of perturbation in the forward: it hooks modules so that they run on perturbed copies of their weights.

Just before a module runs, one pass writes perturbed copies of its weights to a scratch buffer; if there is room, also
of the modules within it. Its parameters' `data` points to the copies until its forward ends. θ is only read.
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
    """A running module, and the copies that it runs on."""

    module: nn.Module
    swapped: Iterable[int] = ()  # indices of the weights that copies replace
    originals: Sequence[tuple[Tensor, Tensor]] = ()  # (weight, its θ)
    place: Any = None  # of the copies in the buffer
    others: Sequence[Tensor] = ()  # tensors that are not trained, and were copied here too
    references: tuple[int, int] | None = None  # references to the buffer after the swap; tables built until then


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of weights at one place in the buffer, and the table that writes them."""

    table: Table
    copies: list[tuple[Tensor, Tensor]]  # (weight, its copy)
    originals: list[tuple[Tensor, Tensor]]  # (weight, its θ)


class Engine:
    """Evaluates closures at perturbed weights. One engine serves one set of tables.

    Args:
        module: the module that owns the weights.
        weights: the tables; the engine only reads them.

    Attributes:
        watch_policy: decides which evaluations are watched for reads of weights outside their modules.

    Raises:
        ValueError: a weight is not a parameter of the module.
    """

    _frame_for_all = False  # whether modules that need no copies get a frame too

    def __init__(self, module: nn.Module, weights: Weights):
        self._module, self._weights = module, weights
        self._tensors = [w.tensor for w in weights.weights]
        self._owners = Owners(module, self._tensors, self._bytes_for)
        self.watch_policy = WatchPolicy(self._tensors, weights.theta, self._owners)
        self._seals = self.watch_policy.seals
        self._wanted: Mapping[nn.Module, frozenset[int]] = {}  # the copies that each module gets in this evaluation
        self._tables: dict[tuple[Any, ...], Any] = {}
        self._ready: dict[nn.Module, Copies] = {}  # the copies that a module gets if nothing else is perturbed yet
        self._ready_for: Any = None
        self._tables_built = 0
        self._sizes: dict[frozenset[int], int] = {}
        self._scratch: Any = self._new_scratch(weights.weights[0].tensor)
        self._hooks: list[RemovableHandle] = []
        self._hooking = False
        self._frames: list[Frame] = []
        self._perturbed: set[int] = set()
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

    def _new_scratch(self, like: Tensor) -> Any:
        """Make the memory for copies."""
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

    def _choose_wanted(self, watch: bool) -> None:
        """Choose which copies each module gets. In a watched evaluation, each gets only those of its own weights."""
        wanted: Mapping[nn.Module, frozenset[int]] = self._owners.owned if watch else self._owners.together
        if (active := self._active) is not None:
            # If some blocks are dropped, a module around them gets its own weights: other choices need too many tables.
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
        """Call the closure while every module runs on the weights that a pass would write; return its result.

        Args:
            closure: runs the module. It is called again if there are signs that it reads weights outside of their
                module, and once more if it does.
            do: the pass. Weights that are not active are not perturbed.
            step: steps taken before.
            from_anchor: perturb the anchors instead of θ.
            watch: look for such reads even without signs. It slows the evaluation down, but does not change the result.
            missed: called with the names of weights whose reads gave no sign, so that earlier evaluations may have
                missed them.

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
            found: collects reads of weights that are not perturbed there; None not to watch.

        Returns:
            What the closure returns, and whether there are signs of such reads.
        """
        self._choose_wanted(watch=found is not None)
        self.watch_policy.begin()
        self._watch, self._seals.on_address, result = None, None, None
        sealed = self._weights_to_seal()
        if found is not None:
            self._thread, self._is_elsewhere = get_ident(), False
            self._seals.on_address = on_read = lambda i: self._note_read(i, found)
            self._watch = Watch(self._tensors_to_watch(), self._scratch.is_free, on_read, self.watch_policy.wrote.add)
            sealed = sealed if self.watch_policy.may_seal else []
        try:
            with self._hooked(), self._watch.watching() if self._watch else nullcontext(), self._seals.of(sealed):
                result = call(closure)
        except RuntimeError:  # such as an operation on tensors of two devices, which a read outside a module causes
            if not (found or self._seals.broken):
                raise
        if found is not None:
            self._owners.saw(self._ran)
        return result, self.watch_policy.saw_signs(self._ran)

    def _run_elsewhere(self, closure: Callable[[], Any]) -> Any:
        """Evaluate a closure that runs modules in another thread, where operations cannot be watched."""
        result, _ = self._run(closure, None)
        if self._seals.broken:
            raise ValueError(
                "closure: it uses weights outside of their module in another thread than that of the step, where "
                "perturbation in the forward cannot see what it does; use perturb='in_place'"
            )
        return result

    def _has_signs(self, closure: Callable[[], Any]) -> bool:
        """Say whether an evaluation that is not watched shows signs of the reads that were found."""
        try:
            return self._run(closure, None)[1]
        except Exception:  # an earlier evaluation would have raised too
            return True

    def _weights_to_seal(self) -> Iterable[int] | None:
        """Return the weights that only their modules may read: the perturbed ones. None for all."""
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
        """Clean up after an evaluation. If an exception from outside ends this, call it again."""
        if self._hooking:  # PyTorch may have a hook whose handle was not stored
            remove_forward_hooks(self._enter, self._leave)
            self._hooking = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seals.unseal_all()
        while self._frames:  # left over by a KeyboardInterrupt and the like, after which PyTorch calls no hook
            self._pop_frame()
        self._scratch.clear()
        self._stack.clear()
        if (watch := self._watch) is not None:
            watch.leave()
        self._watch = None

    def is_still(self) -> bool:
        """Say whether no module was left in the middle of its forward."""
        return not self._frames

    def memory_in_use(self) -> list[Any]:
        """Return the memory that passes use besides θ. Later evaluations may use other memory."""
        return [*self._tables.values(), *self._scratch.chunks]

    def _tensors_to_watch(self) -> list[Tensor]:
        """Return the tensors that may only be read in their module's forward; the weights come first."""
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
        # Are all its weights perturbed already? A module that runs within itself needs a frame for each run.
        if wanted <= self._perturbed and not self._frame_for_all and not self._has_frame(module):
            return
        frame = Frame(module)
        self._frames.append(frame)  # first: an interrupt may come at any line
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or torch.is_grad_enabled():  # a backward pass may read the copies later
            self.watch_policy.suspicious = True
        if self._watch is None and not transformed:
            self._swap(frame, wanted)
            return
        # Passes must run outside the closure's torch.func transform.
        with nullcontext() if self._watch is None else self._watch.paused(), torch._C._DisableFuncTorch():
            self._swap(frame, wanted)

    def _has_frame(self, module: nn.Module) -> bool:
        for frame in self._frames:  # noqa: SIM110 - `any` takes three times as long, for every module
            if frame.module is module:
                return True
        return False

    def _swap(self, frame: Frame, wanted: frozenset[int]) -> None:
        """Replace a module's weights by perturbed copies."""
        first = not self._perturbed
        missing = wanted if first else wanted - self._perturbed
        if not first and not self._scratch.fits(self._bytes_for(missing)):  # leave out the modules within it
            missing = self._owners.owned.get(frame.module, frozenset()) & wanted - self._perturbed
        if not missing:
            return
        frame.place = place = self._scratch.take(self._bytes_for(missing))
        found = self._ready.get(frame.module) if first else None  # an empty buffer always gives the same place
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
        self._perturbed.update(missing)
        frame.references = self._scratch.references(place), self._tables_built

    def _new_copies(self, missing: frozenset[int], place: tuple[int, int]) -> Copies:
        weights, wanted = self._weights, sorted(missing)
        sources = weights.anchors if self._from_anchor else weights.theta
        assert sources is not None
        self._tables_built += 1
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
        # Without a frame, its copies belong to a module around it, and the buffer will be used again.
        if not self._has_frame(module):
            return without_aliases(output, self._scratch.holds) if module in self._owners.owned else None
        replaced = without_aliases(output, self._scratch.holds)
        while (frame := self._pop_frame()).module is not module:
            pass
        if replaced is None and frame.references is not None:
            # The copies are swapped out. If the buffer has more references than expected, somebody keeps a part of it.
            before, built = frame.references
            if built == self._tables_built and self._scratch.references(frame.place) > before - len(frame.originals):
                self.watch_policy.suspicious = True
        return replaced

    def _pop_frame(self) -> Frame:
        """Swap the copies of the last frame out, remove the frame and return it."""
        frame = self._frames[-1]
        for tensor, theta in frame.originals:
            tensor.data = theta
        self._seals.seal(frame.swapped)
        self._perturbed.difference_update(frame.swapped)
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
            return  # the weight is dropped, and its module runs
        running: list[Any] = [m for m in self._stack if m in self._owners.members] or self._stack or [None]
        found.add((i, running[-1]))

    def _borrow(self, found: Reads, strangers: set[int]) -> None:
        """From now on, perturb weights also in the modules that were found to read them; see `check_reachable`."""
        for i, m in check_reachable(found, self._owners, strangers, self._named):
            self._owners.borrow(m, i)

    def _named(self, indices: Iterable[int]) -> str:
        return listed([self._weights.weights[i].name for i in sorted(set(indices))])
