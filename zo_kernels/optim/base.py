"""The base of all zeroth-order optimizers: arguments, and the step of plain SPSA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, device, nn

from .. import checks
from ..closures.losses import Closure, OutOfRange, Pair, Refused, check_closure, check_pair, decay_factors, value_of
from ..closures.watch import Closures
from ..estimators.draws import FIRST_SLOT, MAX_DIRECTIONS, blocks_to_drop, direction_seeds
from ..estimators.numbers import Numbers, spsa_update
from ..ops import ROUNDINGS
from ..perturbation.in_forward import InForward
from ..perturbation.in_forward_probes import InForwardProbes
from ..perturbation.in_place import InPlace, Probes
from ..perturbation.reads.vigilance import drawn
from ..perturbation.streamed import StreamedInForward
from ..perturbation.writes import Unwritten
from ..ranks.parallel import Parallel, ranks_of
from ..runs.alone import alone
from ..runs.attempt import attempted
from ..runs.graphed import GraphedStep, cannot_be_graphed
from ..runs.recorded import RecordedSteps
from ..runs.recording import Recording
from ..trajectory import Kind
from ..trajectory.file import SYNC
from ..warn import Warner
from ..weights.blocks import of_no_use
from ..weights.groups import check_group
from ..weights.masks import Thresholds
from ..weights.rows import Seed
from ..weights.shards import resharding
from ..weights.structure import Structure
from ..weights.tables import Weights

PERTURB = ("auto", "in_place", "in_forward")


class ZeroOrderOptimizer(RecordedSteps):
    """SPSA with Gaussian directions that are regenerated from seeds, never stored (MeZO, arXiv 2305.17333).

    For each of n directions z_k, with L the closure's loss,

        g_k = (L(θ + ε z_k) - L(θ - ε z_k)) / 2ε
        θ  <- (1 - lr * weight_decay) θ - lr / n * sum_k g_k z_k

    Perturbation *in place* overwrites the weights, in 2n + 1 fused passes a step; the last one restores and updates at
    once. Every pass rounds, which 16-bit weights do not stand: they drift. *In the forward*, each module runs on a
    perturbed copy of its own weights, in a buffer that the next module reuses, and θ is written by the update alone.
    Which is better for what, measured: docs/exactness.md.

    Args:
        params: a module, of which it is noticed then if parameters come or go; or what `torch.optim` takes: parameters,
            named parameters, or groups of either. Those that do not require grad are left alone. Noise goes by a
            parameter's qualified name, or by its position if unnamed.
        lr: learning rate.
        eps: the perturbation's scale ε. One for all groups.
        weight_decay: decoupled; not applied to normalisation layers and to parameters of fewer than two dimensions
            unless the group has `decay_all=True`.
        seed: 64-bit seed of the run.
        directions: directions a step.
        sparsity: the fraction of each tensor left alone: only weights with |θ| <= h take part, h being the exact
            percentile at the first step (arXiv 2402.15751). The mask is taken from unperturbed weights in every step. A
            tensor whose percentile does not separate, such as one of zeros, is left dense and named: `SparseMeZO`.
        drop: the fraction of transformer blocks left alone in a step, drawn anew every step (arXiv 2410.09823).
        blocks: the blocks, as modules; None to find them in the module (`optim.blocks.find_blocks`).
        perturb: "in_place", "in_forward" (needs a module, not compiled), or "auto": in the forward for 16-bit weights
            of a module, else in place, with a warning if the weights have 16 bits.
        execution_device: the device that the module's forward runs on, if its tensors are elsewhere, such as on a CPU
            because a GPU's memory does not hold them: perturb="in_forward" copies each module's parameters there just
            before it runs. The weights are updated where they are. Buffers are moved there for good, and parameters on
            the CPU to pinned memory. Forwards between steps need `streaming()`. None: everything is where it is needed.
        rounding: "nearest", "stochastic", or "auto": stochastic. It matters to 16-bit weights alone.
        trajectory: a new file to which every step is appended; see `trajectory` below.
        sync: when that file is forced to the disk. What a step wrote survives the death of the process in any case; a
            power cut, or a crash of the system, it survives only then. "step": after every step, which costs some
            milliseconds. "checkpoint": when `state_dict()` is called, and at the end. "never": when the system likes.
        parallel: how the ranks of a torch.distributed process group take steps together, sending each other losses
            alone: "batch" (each evaluates its part of the batch), "directions" (each evaluates its part of the
            directions), a `zo_kernels.Parallel`, "off", or "auto": "batch" if there are several ranks. All of them make
            the optimizer alike, of equal weights.
        backend: see `zo_kernels.add_noise_`.
        strict: raise a ValueError where there would be a warning of something that makes a run wrong.

    `lr`, `eps`, `weight_decay`, `decay_all` and `sparsity` may be given for each group; other keys are refused.

    Attributes:
        step_count: steps taken, refused ones included.
        refused_steps: steps refused (see `step`). Asking for this or the next two waits for a GPU.
        projected_gradients: g_k of the last step; zeros if it was refused.
        bytes_sent: by this rank to each of the others, in all steps so far: 32 a step and 16 a direction of its own,
            and a message more whenever options change, of 64 bytes in the first step.
        trajectory: what `zo_kernels.replay` needs to rebuild the weights of any step, as `zo_kernels.Trajectory`.
        trajectory_path: the file that it is written to, None if there is none (or if another rank writes it).

    Raises:
        TypeError, ValueError: an argument is out of range, or a parameter cannot be perturbed; the message names it.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        directions: int = 1,
        sparsity: float = 0.0,
        drop: float = 0.0,
        blocks: Sequence[nn.Module] | None = None,
        perturb: str = "auto",
        execution_device: device | str | None = None,
        rounding: str = "auto",
        trajectory: str | FilePath | None = None,
        sync: str = "checkpoint",
        parallel: str | Parallel = "auto",
        backend: str | None = None,
        strict: bool = False,
    ):
        self.seed = checks.integer("seed", seed, 0, checks.MAX_SEED)
        self.directions = checks.integer("directions", directions, 1, MAX_DIRECTIONS)
        self.drop = checks.number("drop", drop, 0.0, 1.0, open_high=True)
        checks.choice("perturb", perturb, PERTURB)
        self.rounding = checks.choice("rounding", rounding, ("auto", *ROUNDINGS))
        checks.choice("sync", sync, SYNC)
        if not isinstance(strict, bool):
            raise TypeError(f"strict: expected a bool, got {type(strict).__name__}")
        self._warner = Warner(strict)
        self.backend = backend
        self._ranks = ranks_of(parallel)
        if self._ranks is not None:
            self._ranks.check_directions(self.directions)
        self.step_count = 0
        self._refused_steps = 0
        self._gradients = []
        self._weights = self._built_for = self._in_forward = None
        self._builds = self._steps_since_built = 0  # of the tables
        self._torn = False

        module = params if isinstance(params, nn.Module) else None
        if (reshard := resharding(module)) is not None:
            reshard()  # or else the parameters that it shows may be gathered ones, which are given up later
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "decay_all": False, "sparsity": sparsity}
        check_group(defaults, "")
        given: Any = params if module is None else list(module.named_parameters())
        super().__init__(given, defaults)

        self._module, self._reshard = module, reshard
        self._structure = None if module is None else Structure(module, self._parameters())
        self._names, self._blocks = {}, blocks
        self._derive()
        if self.drop and (reason := of_no_use(self._n_blocks, self.drop, self._block_of, self._trainable())):
            self._warner.warn("drop", f"drop: {reason}")
        self._thresholds = Thresholds(self._warner)
        self._execution_device = None if execution_device is None else self._stream_to(execution_device, perturb)
        self._asked_perturb = perturb
        self.perturb = self._choose_perturb()
        self._closures = Closures(self._warner, module)
        self._recording = Recording(sync, self._warner)
        if trajectory is not None:
            self.record_to(trajectory)
        self._prepare()

    def _seeds(self, slot: int = FIRST_SLOT) -> list[int]:
        return direction_seeds(self.seed, self.step_count, self.directions, slot)

    def _draw_dropped(self) -> frozenset[int]:
        return blocks_to_drop(self.seed, self.step_count, self._n_blocks, self.drop)

    def _probes(self, weights: Weights, active: Sequence[int] | None) -> Probes:
        """For the evaluations of a step at θ."""
        if self._in_forward is not None:
            return self._probes_in_forward(weights, active)
        return InPlace(weights, active, self._unwritten(weights))

    def _unwritten(self, weights: Weights) -> Unwritten:
        return Unwritten(weights, guarded=self._steps_since_built == 0)

    def _probes_in_forward(
        self, weights: Weights, active: Sequence[int] | None, *, from_anchor: bool = False
    ) -> InForwardProbes:
        assert self._in_forward is not None
        options: Any = {"step": self.step_count, "warner": self._warner, "watch": self._watches()}
        return InForwardProbes(self._in_forward, weights, active, from_anchor=from_anchor, **options)

    def _watches(self) -> bool:
        """Whether this step looks for weights that are read outside of their module even if nothing points to it."""
        return drawn(self.seed, self.step_count)

    @attempted
    def step(self, closure: Closure | None = None) -> Tensor | float:  # type: ignore[override]
        """One step: two evaluations of the loss a direction, then the update.

        Args:
            closure: returns the loss, a scalar tensor or a number; called 2 * directions times, without gradients. It
                should be deterministic within a step (same batch, same dropout). In-forward perturbation reaches the
                modules that it calls; should it read a weight elsewhere, that is noticed, in whichever call: a weight
                that another module's forward reads is perturbed for that forward, and the closure is called once more;
                one that is read outside of all modules is an error (docs/exactness.md). It may not write to trained
                weights, which in place are perturbed at that moment.

        Returns:
            The mean of the losses seen, as a tensor if the closure returns tensors.

        Warns:
            once of each, or raises ValueError if `strict`: the loss is a tensor of 16 bits, so that g comes in steps of
            2^-8 L / 2ε or so; L+ and L- are equal in 20 steps in a row, or differ in 10 by no more than a few of the
            steps that they come in; dropout draws other numbers for L+ than for L-, or batch normalisation is in
            training mode (of the module that was given); the closure draws a batch or noise anew in each call, for
            which it is called once more in the steps 1, 2, 3, 5, 9, ... if a random generator moved; a weight has a
            `.grad`, which means nothing here. Losses on a GPU are looked at when they are there, at the start of a
            later step, which is where they raise; others are looked at before the update, and the step is refused.

        Raises:
            TypeError, ValueError: the closure returned no finite scalar, or losses too far apart for float32. The step
                is refused, counted in `refused_steps`, and the weights are restored. A loss on a GPU is not waited for:
                if it is not finite, the step is refused all the same, on the device, but nothing is raised. Whatever
                the closure raises also leaves restored weights behind. Restored means up to float rounding of the
                passes in place, and exactly in the forward.
            ValueError: the update might make a weight infinite: lr |g| is above 1e30, or 1024 if there are float16
                weights, or lr * weight_decay above 2. The step is refused, as above; where the losses stay on a GPU,
                the former is refused there, without a word. The weights themselves are not looked at: those that are
                above half of their dtype's largest number may still overflow.
            ValueError: perturbation in the forward cannot reach a weight; the message names it.
            ValueError: the closure writes to a weight that is perturbed in place. In the first step that is noticed
                before it does. Later it is noticed afterwards, by PyTorch's count of a tensor's changes (not where
                `weight.data` is changed): then the weights must be loaded anew, but for MeZO-SVRG's.
            ValueError: the module that the optimizer was given no longer has parameters that are trained, or has new
                ones that are not; the message names them. Nothing is changed.
            RuntimeError: another thread is in a step of this optimizer, or the closure calls this. Nothing is changed.
            OSError: the trajectory's file cannot be written. The step was taken; the next one writes what is missing.
        """
        attempt = self._attempt
        assert attempt is not None
        with self._telling_others():
            closure = check_closure("closure", closure)
            eps, rates, decays, weights = self._begin()
        attempt.probes = probes = self._probes(weights, weights.active(self._draw_dropped()))
        seeds, seen = self._seeds(), list[Any]()
        pairs = self._probe(probes, closure, seeds, eps, seen)
        numbers = Numbers.of([pairs], eps, rates, decays, reach=weights.reach)
        if numbers.refusal is not None:
            raise Refused(OutOfRange, numbers.refusal, of="")
        taking = self._taking(attempt, weights, Kind.STEP, rates, eps, numbers, pairs)
        probes.finish(spsa_update(seeds, numbers.gradients[0], numbers.rates), numbers.decays, taking)
        self._taken(attempt, weights)
        return self._mean_loss(seen, pairs)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """For forwards between steps, such as evaluations: with `execution_device` modules run there, on copies of
        their weights. Without it nothing happens. No gradients are computed within.

            with opt.streaming():
                logits = model(**batch_on_the_device).logits
        """
        engine = self._ready_to_stream()
        with torch.no_grad(), engine.unperturbed() if isinstance(engine, StreamedInForward) else nullcontext():
            yield

    @alone("streaming")
    def _ready_to_stream(self) -> InForward | None:
        self._prepare()
        return self._in_forward

    @alone("graphed")
    def graphed(self, closure: Closure, *, warmup: int = 3, same_bits: bool = True) -> GraphedStep:
        """Steps whose launches are captured in a CUDA graph, for models whose forward is a matter of launches.

        Calling what this returns takes a step, as `step(closure)` would, bit for bit: it is counted and recorded, and
        learning rates, weight decay and seeds are those of the moment. The closure itself is called in the first
        `warmup` steps and for the capture; later steps repeat what the device did then, so it must read its
        batch from the same tensors every time (`batch.copy_(next_batch)`). After a change of eps, of the directions
        or of the trained weights there is an ordinary step and another capture.

        A graph repeats one path through the model, and a model may take another when it is captured: transformers
        does, since it cannot look at the mask then. So before each capture the closure is called twice more at the
        weights as they are, once captured, and its operations and losses are compared. That waits for the device.

        Args:
            closure: as for `step`; its losses are tensors on the device.
            warmup: ordinary steps before the capture, at least 1.
            same_bits: raise where the captured closure does not do what the ordinary one does, whatever the batch. With
                False nothing is compared, and the graph's losses are those of the path that is captured; they are the
                ones that are recorded, so that the trajectory gives the weights all the same.

        Raises:
            TypeError, ValueError: an argument is wrong, or the steps of this optimizer are not all alike: with `drop`,
                and with MeZO-SVRG.
        """
        check_closure("closure", closure)
        checks.integer("warmup", warmup, 1)
        if not isinstance(same_bits, bool):
            raise TypeError(f"same_bits: expected a bool, got {type(same_bits).__name__}")
        if (reason := self._steps_differ() or cannot_be_graphed(self._prepare().theta[0].device)) is not None:
            raise ValueError(f"graphed: expected an optimizer whose steps can be captured, but {reason}; use opt.step")
        return GraphedStep(self, closure, warmup, same_bits)

    def _steps_differ(self) -> str | None:
        """Why not all steps launch the same, or None."""
        if self._ranks is not None:
            return "ranks exchange their losses in every step"
        if self._execution_device is not None:
            return "with execution_device, weights are copied to where the forward runs in every step"
        return "with drop, every step changes other weights" if self.drop else None

    def _launches_depend_on(self) -> tuple[Any, ...]:
        """All that makes a step's launches others, but for the numbers that they read from memory."""
        decays = decay_factors(self._rates(), self._weight_decays())
        return self._builds, self._eps(), self.directions, any(d != 1.0 for d in decays)

    def _memory_in_use(self) -> list[Any]:
        """What launches read and write besides θ."""
        engine = self._in_forward
        return [self._weights, engine, [] if engine is None else engine.memory_in_use()]

    def _begin(self) -> tuple[float, list[float], list[float], Weights]:
        """What precedes a step: eps, rates and decays for each row, the tables."""
        eps, rates = self._eps(), self._rates()
        decays = decay_factors(rates, self._weight_decays())
        weights = self._prepare()
        self._check_whole(weights)
        weights.reach.check_eps(eps)
        self._closures.begin(weights, self._steps_since_built)
        self._begin_record(weights, eps)
        return eps, rates, decays, weights

    def _telling_others(self) -> AbstractContextManager[None]:
        """What fails within is told to the ranks that wait for this one in the step."""
        return nullcontext() if self._ranks is None else self._ranks.telling(self.step_count)

    def _probe(
        self, probes: Probes, closure: Closure, seeds: Sequence[Seed], eps: float, seen: list[Any]
    ) -> list[Pair]:
        """As `_evaluate`, of the directions of all ranks, each of which does its part."""
        closure = self._closures.looked_at(closure, eps)
        assert self._weights is not None
        if self._ranks is None:
            pairs = self._evaluate(probes, closure, seeds, eps, seen)
            self._note_writes(self._weights, eps)
            return pairs
        own, known = self._ranks.own(seeds), (self.step_count, self._agreed(), self._weights.shards)
        try:
            pairs = self._evaluate(probes, closure, own, eps, seen)
            self._note_writes(self._weights, eps)
        except Exception as error:
            # To the end, as where nothing is wrong: weights that went another way would be rounded otherwise.
            for seed, signed in [(s, e) for s in own for e in (eps, -eps)][probes.moves :]:
                probes.to({seed: signed})
            self._ranks.tell(error, len(own), *known)
            raise
        return self._ranks.exchange(pairs, *known)

    def _mean_loss(self, seen: Sequence[Any], pairs: Sequence[Pair]) -> Tensor | float:
        """Of the losses that the closure returned, here and on the other ranks."""
        if self._ranks is None:
            return sum(seen) / len(seen)
        mean = sum(value for pair in pairs for value in pair) / (2 * len(pairs))
        return torch.as_tensor(mean, device=seen[0].device).to(seen[0]) if isinstance(seen[0], Tensor) else mean

    @property
    def bytes_sent(self) -> int:
        return 0 if self._ranks is None else self._ranks.bytes_sent

    @staticmethod
    def _evaluate(probes: Probes, closure: Closure, seeds: Sequence[Seed], eps: float, seen: list[Any]) -> list[Pair]:
        """(L+, L-) of each seed; what the closure returned is added to `seen`."""
        pairs: list[Pair] = []
        for seed in seeds:
            values = []
            for signed in (eps, -eps):
                probes.to({seed: signed})
                loss, value = value_of(probes.evaluate(closure))
                seen.append(loss)
                values.append(value)
            pair = (values[0], values[1])
            check_pair(pair, eps)
            pairs.append(pair)
        return pairs
