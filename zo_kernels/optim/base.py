"""The base of all zeroth-order optimizers: arguments, parameter groups, state, and the step of plain SPSA."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, names, spec
from ..ops import ROUNDINGS
from ..trajectory import Kind, Record, Setup, Trajectory
from .blocks import block_of_parameters
from .draws import FIRST_SLOT, blocks_to_drop, direction_seeds
from .graphed import GraphedStep, cannot_be_graphed
from .groups import check_eps, check_group, check_owned, given_blocks, norm_parameters
from .in_forward import InForward, InForwardProbes, cannot_perturb_in_forward
from .interrupts import interrupts_held
from .losses import Closure, Refused, check_closure, check_pair, decay_factors, value_of
from .numbers import Numbers, Pair, Seed, Value, device_of, spsa_update, stacked
from .probes import InPlace, Probes
from .recording import Recording, weight_setups
from .replay import Replay
from .thresholds import magnitude_threshold
from .weights import Weight, Weights

MAX_DIRECTIONS = 2**16
PERTURB = ("auto", "in_place", "in_forward")


class ZeroOrderOptimizer(torch.optim.Optimizer):
    """SPSA with Gaussian directions that are regenerated from seeds, never stored (MeZO, arXiv 2305.17333).

    For each of n directions z_k, with L the closure's loss,

        g_k = (L(θ + ε z_k) - L(θ - ε z_k)) / 2ε
        θ  <- (1 - lr * weight_decay) θ - lr / n * sum_k g_k z_k

    Perturbation *in place* overwrites the weights, in 2n + 1 fused passes a step; the last one restores and updates at
    once. Every pass rounds, which 16-bit weights do not stand: they drift. *In the forward*, each module runs on a
    perturbed copy of its own weights, in a buffer that the next module reuses, and θ is written by the update alone.
    Which is better for what, measured: docs/exactness.md.

    Args:
        params: a module; or what `torch.optim` takes: parameters, named parameters, or groups of either. Those that do
            not require grad are left alone. Noise goes by a parameter's qualified name, or by its position if unnamed.
        lr: learning rate.
        eps: the perturbation's scale ε. One for all groups.
        weight_decay: decoupled; not applied to normalisation layers and to parameters of fewer than two dimensions
            unless the group has `decay_all=True`.
        seed: 64-bit seed of the run.
        directions: directions a step.
        sparsity: the fraction of each tensor left alone: only weights with |θ| <= h take part, h being the exact
            percentile when the optimizer is made (arXiv 2402.15751). The mask is taken from unperturbed weights in
            every step.
        drop: the fraction of transformer blocks left alone in a step, drawn anew every step (arXiv 2410.09823).
        blocks: the blocks, as modules; None to find them in the module (`optim.blocks.find_blocks`).
        perturb: "in_place", "in_forward" (needs a module, not compiled), or "auto": in the forward for 16-bit weights
            of a module, else in place, with a warning if the weights have 16 bits.
        rounding: "nearest", "stochastic", or "auto": stochastic. It matters to 16-bit weights alone.
        trajectory: a new file to which every step is appended; see `trajectory` below.
        backend: see `zo_kernels.add_noise_`.

    `lr`, `eps`, `weight_decay`, `decay_all` and `sparsity` may be given for each group.

    Attributes:
        step_count: steps taken, refused ones included.
        refused_steps: steps refused because a loss was not finite. Asking for this or the next two waits for a GPU.
        projected_gradients: g_k of the last step; zeros if it was refused.
        trajectory: what `zo_kernels.replay` needs to rebuild the weights of any step, as `zo_kernels.Trajectory`.

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
        rounding: str = "auto",
        trajectory: str | FilePath | None = None,
        backend: str | None = None,
    ):
        self.seed = checks.integer("seed", seed, 0, checks.MAX_SEED)
        self.directions = checks.integer("directions", directions, 1, MAX_DIRECTIONS)
        self.drop = checks.number("drop", drop, 0.0, 1.0, open_high=True)
        checks.choice("perturb", perturb, PERTURB)
        self.rounding = checks.choice("rounding", rounding, ("auto", *ROUNDINGS))
        self.backend = backend
        self.step_count = 0
        self._refused_steps = 0
        self._gradients: list[Value] = []
        self._weights: Weights | None = None
        self._built_for: tuple[list[Any], int] | None = None
        self._in_forward: InForward | None = None
        self._builds = self._steps_since_built = 0  # of the tables

        module = params if isinstance(params, nn.Module) else None
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay_all": False,
            "sparsity": sparsity,
        }
        check_group(defaults, "")
        given: Any = params if module is None else list(module.named_parameters())
        super().__init__(given, defaults)

        self._module = module
        self._norms = norm_parameters(module)
        self._names = self._name()
        self._ids = self._identify()
        found = given_blocks(module, blocks, self.drop)
        self._n_blocks, self._block_of = len(found), block_of_parameters(found)
        self._thresholds: dict[Tensor, float] = {}
        self.perturb = self._choose_perturb(perturb)
        self._recording = Recording()
        if trajectory is not None:
            self.record_to(trajectory)
        self._prepare()

    def _choose_perturb(self, asked: str) -> str:
        """What was asked for, or what "auto" comes to."""
        reason = cannot_perturb_in_forward(self._module)
        if asked == "in_forward" and reason:
            raise ValueError(f"perturb: 'in_forward' cannot be: {reason}")
        if asked != "auto" or all(p.element_size() >= 4 for p in self._trainable()):
            return "in_place" if asked == "auto" else asked
        if reason:
            warnings.warn(
                "perturbing 16-bit weights in place rounds them three times a step, so they drift; in the forward they "
                f"would not, but {reason} (perturb='in_place' silences this warning)",
                stacklevel=3 + (type(self).__init__ is not ZeroOrderOptimizer.__init__),  # the line that makes it
            )
            return "in_place"
        return "in_forward"

    def _name(self) -> dict[Tensor, str]:
        """Each parameter's name; those of a module include what is frozen, so that freezing changes no id."""
        if self._module is not None:
            return names.of_module(self._module)
        every: dict[Tensor, str] = {}
        for group in self.param_groups:
            names.add_group(every, group)
        return every

    def _identify(self) -> dict[Tensor, int]:
        ids = names.param_ids(self._names.values())
        return {p: ids[name] for p, name in self._names.items()}

    def _trainable(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _prepare(self) -> Weights:
        """The tables, built anew if a parameter was frozen, unfrozen, moved or added since the last pass."""
        if self._built_for is None:
            for p in self._trainable():
                checks.weight(self._names[p], p)
        trainable = [(id(p), p.data_ptr(), p.numel(), p.dtype) for p in self._trainable()]
        signature = (trainable, len(self.param_groups))
        if self._weights is not None and signature == self._built_for:
            return self._weights
        if self._built_for is not None and self._built_for[0] != trainable:
            self._on_other_weights()
        found = []
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                name = self._names[p]
                exempt = p in self._norms or p.dim() < 2
                row = 2 * g + int(exempt and not group["decay_all"])
                found.append(Weight(name, p, self._ids[p], row, self._block_of.get(p), self._threshold(p, group)))
        if not found:
            raise ValueError("params: expected at least one parameter that requires grad, got none")
        anchors = self._anchors(found)
        keep_masks = self.perturb == "in_place" or anchors is not None
        rows, stochastic = 2 * len(self.param_groups), self.rounding != "nearest"
        weights = Weights(found, rows, stochastic, anchors, keep_masks, self.backend)
        if self.perturb == "in_forward":
            assert self._module is not None
            self._in_forward = InForward(self._module, weights)
        self._weights, self._built_for, self._steps_since_built = weights, signature, 0
        self._builds += 1
        return self._weights

    def _on_other_weights(self) -> None:
        """Called when other memory is trained than in the last step."""

    def _anchors(self, weights: Sequence[Weight]) -> Sequence[Tensor] | None:
        """Snapshots that passes may start from, for methods that have them."""
        return None

    def _threshold(self, p: Tensor, group: dict[str, Any]) -> float | None:
        if group["sparsity"] == 0.0:
            return None
        if p not in self._thresholds:
            self._thresholds[p] = magnitude_threshold(p, group["sparsity"])
        return self._thresholds[p]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the new parameters take part from the next step on."""
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            where = f"param_groups[{len(self.param_groups)}]: "
            check_group({**self.defaults, **param_group}, where)
            if getattr(self, "perturb", None) == "in_forward":
                assert self._module is not None
                check_owned(param_group, self._module, where)
        super().add_param_group(param_group)
        if hasattr(self, "_names"):  # not while the base class is adding the first groups
            names.add_group(self._names, self.param_groups[-1])
            self._ids = self._identify()

    def _eps(self) -> float:
        values = {group["eps"] for group in self.param_groups}
        if len(values) != 1:
            raise ValueError(f"eps: expected one value for all groups, got {sorted(values)}")
        return check_eps("eps", values.pop())

    def _rates(self, key: str = "lr") -> list[float]:
        """A learning rate for each row."""
        return [checks.number(key, g[key], 0.0) for g in self.param_groups for _ in range(2)]

    def _weight_decays(self) -> list[float]:
        """Of each row: the odd rows are exempt."""
        decays = [checks.number("weight_decay", g["weight_decay"], 0.0) for g in self.param_groups]
        return [w for decay in decays for w in (decay, 0.0)]

    def _seeds(self, slot: int = FIRST_SLOT) -> list[int]:
        return direction_seeds(self.seed, self.step_count, self.directions, slot)

    def _draw_dropped(self) -> frozenset[int]:
        return blocks_to_drop(self.seed, self.step_count, self._n_blocks, self.drop)

    def _probes(self, weights: Weights, active: Sequence[int] | None, *, watch: bool) -> Probes:
        """For the evaluations of a step at θ."""
        if self._in_forward is not None:
            return InForwardProbes(self._in_forward, weights, active, watch=watch)
        return InPlace(weights, active)

    def _watches(self) -> bool:
        """Whether this step looks for weights that are read outside of their module: the first, second, fourth, ..."""
        n = self._steps_since_built
        return n & (n - 1) == 0

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor | float:  # type: ignore[override]
        """One step: two evaluations of the loss a direction, then the update.

        Args:
            closure: returns the loss, a scalar tensor or a number; called 2 * directions times, without gradients. It
                should be deterministic within a step (same batch, same dropout). In-forward perturbation reaches the
                modules that it calls; should it read a weight elsewhere, that is noticed (in the steps 1, 2, 3, 5, 9,
                17, ...): a weight that another module's forward reads is perturbed for that forward, and the closure
                is called once more; one that is read outside of all modules is an error.

        Returns:
            The mean of the losses seen, as a tensor if the closure returns tensors.

        Raises:
            TypeError, ValueError: the closure returned no finite scalar, or losses too far apart for float32. The step
                is refused, counted in `refused_steps`, and the weights are restored. A loss on a GPU is not waited for:
                if it is not finite, the step is refused all the same, on the device, but nothing is raised. Whatever
                the closure raises also leaves restored weights behind. Restored means up to float rounding of the
                passes in place, and exactly in the forward.
            ValueError: perturbation in the forward cannot reach a weight; the message names it.
            OSError: the trajectory's file cannot be written. The step was taken; the next one writes what is missing.
        """
        check_closure("closure", closure)
        eps, rates, decays, weights = self._begin()
        probes = self._probes(weights, weights.active(self._draw_dropped()), watch=self._watches())
        seeds, seen = self._seeds(), list[Any]()
        pairs = self._probe(probes, closure, seeds, eps, seen)
        numbers = Numbers.of([pairs], eps, rates, decays)
        with interrupts_held():
            probes.finish(spsa_update(seeds, numbers.gradients[0], numbers.rates), numbers.decays)
            self._took_step(weights, rates, eps, numbers, pairs)
        return sum(seen) / len(seen)

    def graphed(self, closure: Closure, *, warmup: int = 3) -> GraphedStep:
        """Steps whose launches are captured in a CUDA graph, for models whose forward is a matter of launches.

        Calling what this returns takes a step, as `step(closure)` would, bit for bit: it is counted and recorded, and
        learning rates, weight decay and seeds are those of the moment. The closure itself is called in the first
        `warmup` steps and once more for the capture; later steps repeat what the device did then, so it must read its
        batch from the same tensors every time (`batch.copy_(next_batch)`). After a change of eps, of the directions
        or of the trained weights there is an ordinary step and another capture.

        Args:
            closure: as for `step`; its losses are tensors on the device.
            warmup: ordinary steps before the capture, at least 1.

        Raises:
            TypeError, ValueError: an argument is wrong, or the steps of this optimizer are not all alike: with `drop`,
                and with MeZO-SVRG.
        """
        check_closure("closure", closure)
        checks.integer("warmup", warmup, 1)
        if (reason := self._steps_differ() or cannot_be_graphed(self._prepare().theta[0].device)) is not None:
            raise ValueError(f"graphed: expected an optimizer whose steps can be captured, but {reason}")
        return GraphedStep(self, closure, warmup)

    def _steps_differ(self) -> str | None:
        """Why not all steps launch the same, or None."""
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
        self._begin_record(weights, eps)
        return eps, rates, decays, weights

    def _probe(
        self, probes: Probes, closure: Closure, seeds: Sequence[Seed], eps: float, seen: list[Any]
    ) -> list[Pair]:
        """As `_evaluate`; on any failure θ is restored, and the step is recorded."""
        moves: list[float] = []
        try:
            return self._evaluate(probes, closure, seeds, eps, seen, moves)
        except BaseException as error:
            with interrupts_held():
                probes.to({})
                self._failed(Kind.REFUSED if isinstance(error, Refused) else Kind.INTERRUPTED, len(moves))
            if not isinstance(error, Refused):
                raise
            raise error.error(f"closure: {error}; the step is refused, the weights are restored") from None

    @staticmethod
    def _evaluate(
        probes: Probes,
        closure: Closure,
        seeds: Sequence[Seed],
        eps: float,
        seen: list[Any],
        moves: list[float] | None = None,
    ) -> list[Pair]:
        """(L+, L-) of each seed; what the closure returned is added to `seen`, each move of the weights to `moves`."""
        pairs: list[Pair] = []
        for seed in seeds:
            values = []
            for signed in (eps, -eps):
                with interrupts_held():
                    probes.to({seed: signed})
                    if moves is not None:
                        moves.append(signed)
                loss, value = value_of(probes.evaluate(closure))
                seen.append(loss)
                values.append(value)
            pair = (values[0], values[1])
            check_pair(pair, eps)
            pairs.append(pair)
        return pairs

    def _took_step(
        self, weights: Weights, rates: Sequence[float], eps: float, numbers: Numbers, pairs: Sequence[Pair]
    ) -> None:
        """`_took`, of a step of plain SPSA."""
        self._took(weights, Kind.STEP, rates, eps, numbers, pairs)

    def _took(
        self,
        weights: Weights,
        kind: Kind,
        rates: Sequence[float],
        eps: float,
        numbers: Numbers,
        pairs: Sequence[Pair],
        anchor_pairs: Sequence[Pair] = (),
    ) -> None:
        """Count a step that has been taken."""
        here: Any = tuple(pairs)
        there: Any = tuple(anchor_pairs)
        record = Record(self.step_count, kind, tuple(rates[::2]), here, there, eps=eps)
        self._gradients = numbers.gradients[0]
        self.step_count += 1
        self._steps_since_built += 1
        flat = [value for pair in (*pairs, *anchor_pairs) for value in pair]
        where = device_of(*flat)
        self._recording.took(record, weights, None if where is None else stacked(flat, where))

    @property
    def projected_gradients(self) -> list[float]:
        if (where := device_of(*self._gradients)) is not None:
            self._gradients = stacked(self._gradients, where).tolist()
        return list(self._gradients)  # type: ignore[arg-type]

    @property
    def refused_steps(self) -> int:
        return self._refused_steps + self._recording.refused_unseen

    @refused_steps.setter
    def refused_steps(self, n: int) -> None:
        self._refused_steps = n - self._recording.refused_unseen

    def _failed(self, kind: Kind, reached: int) -> None:
        """Count a step that ended without an update; after a refusal the next one draws other directions, since these
        might fail for ever.
        """
        assert self._weights is not None
        record = Record(self.step_count, kind, probes=reached)
        if kind is Kind.REFUSED:
            self.step_count += 1
            self.refused_steps += 1
        self._recording.took(record, self._weights)

    @property
    def trajectory(self) -> Trajectory:
        return self._recording.trajectory

    def _begin_record(self, weights: Weights, eps: float) -> None:
        key = (self._builds, eps, self.seed, self.directions, self.drop, *self._weight_decays())
        self._recording.begin(key, lambda continues: self._setup(weights, eps, continues), weights)

    def _svrg_setup(self) -> dict[str, bool]:
        """The fields of a setup that are MeZO-SVRG's."""
        return {"svrg": False, "shared_direction": False, "anchored": False}

    def _setup(self, weights: Weights, eps: float, continues: bool) -> Setup:
        return Setup(
            method=type(self).__name__,
            noise=spec.VERSION,
            step=self.step_count,
            continues=continues,
            seed=self.seed,
            directions=self.directions,
            eps=eps,
            drop=self.drop,
            blocks=self._n_blocks,
            in_place=self.perturb == "in_place",
            stochastic=weights.stochastic,
            weight_decays=tuple(self._weight_decays()[::2]),
            **self._svrg_setup(),
            weights=weight_setups(weights, names.bare(self._names)),
        )

    def record_to(self, path: str | FilePath) -> None:
        """Write the trajectory to a new file: the steps so far, and every step to come as it is taken.

        A step is appended by one write, so that the file holds it even if the process is killed right after.

        Raises:
            TypeError: it is no path.
            ValueError: the file exists.
        """
        self._recording.write_to(path)

    def resume(self, path: str | FilePath) -> None:
        """Go on with a run that was cut off: replay its trajectory's file onto the weights that it started with, and
        append to it from now on. What is cut off or damaged at the file's end is dropped from it.

        The next step is the one that the run would have taken. Learning rates are not the trajectory's business: set
        the scheduler to `step_count`, and the data to the same place.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be read or written.
            ValueError: this optimizer has taken steps already, is of another method, or its parameters are not those
                that the run started with (see `zo_kernels.replay`).
        """
        if self.step_count:
            raise ValueError(f"resume: expected an optimizer that has taken no step, got one after {self.step_count}")
        trajectory = Trajectory.load(path, recover=True)
        if trajectory.setups:
            last = trajectory.setups[-1][1]
            if last.method != type(self).__name__:
                raise ValueError(f"resume: expected a trajectory of {type(self).__name__}, got one of {last.method}")
            replay = Replay(self._names, trajectory, self.backend)
            replay.run()
            self._go_on_from(replay, last)
        self._recording.go_on(path, trajectory)

    def _go_on_from(self, replay: Replay, setup: Setup) -> None:
        trajectory = replay.trajectory
        self.step_count = trajectory.steps
        self.refused_steps = trajectory.refused_steps
        self.seed, self.directions, self.drop = setup.seed, setup.directions, setup.drop
        by_name = {name: p for p, name in names.bare(self._names).items()}
        self._thresholds = {by_name[w.name]: w.threshold for w in setup.weights if w.threshold is not None}
        self._weights = None
        self._recording.note_versions(self._prepare())

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, and what the run needs to go on bit for bit, under "zo"."""
        return {**super().state_dict(), "zo": self._zo_state()}

    def _zo_state(self) -> dict[str, Any]:
        parameters = [p for g in self.param_groups for p in g["params"]]
        return {
            "method": type(self).__name__,
            "noise": spec.VERSION,
            "seed": self.seed,
            "step_count": self.step_count,
            "refused_steps": self.refused_steps,
            "directions": self.directions,
            "drop": self.drop,
            "param_ids": [self._ids[p] for p in parameters],
            "thresholds": [self._thresholds.get(p) for p in parameters],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a run: the next step draws what it would have drawn.

        Raises:
            ValueError: the state is of another kind of optimizer, or its parameters have other ids (names).
        """
        if "zo" not in state_dict:
            raise ValueError("state_dict: expected the state of a zeroth-order optimizer, got one without 'zo'")
        zo = state_dict["zo"]
        ours = self._zo_state()
        for key in ("method", "noise", "param_ids"):
            if zo.get(key) != ours[key]:
                raise ValueError(f"state_dict: expected {key} {ours[key]!r}, got {zo.get(key)!r}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        for key in ("seed", "step_count", "refused_steps", "directions", "drop"):
            setattr(self, key, zo[key])
        parameters = [p for g in self.param_groups for p in g["params"]]
        self._thresholds = {p: h for p, h in zip(parameters, zo["thresholds"], strict=True) if h is not None}
        self._weights = None
        self._recording.forget_versions()

    def __getstate__(self) -> dict[str, Any]:
        # The tables hold addresses, so a copy builds its own; a scheduler's wrapper of `step` is bound to the original.
        own = {k: v for k, v in self.__dict__.items() if k != "step"}
        return {**own, "_weights": None, "_built_for": None, "_in_forward": None}
