"""The base of all zeroth-order optimizers: a thin `torch.optim` layer over the parts of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import device, nn

from .. import checks
from ..closures.losses import Closure, check_closure
from ..closures.watch import Closures
from ..doubts import Doubts
from ..estimators.draws import MAX_DIRECTIONS
from ..estimators.protocol import Estimator, Step
from ..estimators.two_sided import TwoSided
from ..interrupts import signals_held
from ..ops import ROUNDINGS
from ..perturbation.choice import PERTURB, Perturbation
from ..perturbation.place import Place
from ..perturbation.reads.vigilance import drawn
from ..ranks.parallel import Parallel, ranks_of
from ..runs import state
from ..runs.attempt import alone, attempted
from ..runs.graphed import GraphedStep, cannot_be_graphed
from ..runs.resuming import Resume
from ..runs.run import Progress, Run
from ..trajectory import Trajectory
from ..trajectory.file import SYNC
from ..weights.groups import check_group, check_keys, eps_of, rates_of, weight_decays_of
from ..weights.shards import local
from ..weights.tables import Weights
from ..weights.trained import Trained, trainable


def held_by(part: str, name: str) -> Any:
    """An attribute of an optimizer that one of its parts holds."""
    return property(
        lambda self: getattr(getattr(self, part), name), lambda self, v: setattr(getattr(self, part), name, v)
    )


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

    perturb: str = held_by("_perturbation", "name")
    seed: int = held_by("_run", "seed")
    directions: int = held_by("_run", "directions")
    drop: float = held_by("_trained", "drop")
    step_count: int = held_by("_run", "steps")

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
        trajectory: str | Path | None = None,
        sync: str = "checkpoint",
        parallel: str | Parallel = "auto",
        backend: str | None = None,
        strict: bool = False,
        estimator: Estimator | None = None,
    ):
        seed = checks.integer("seed", seed, 0, checks.MAX_SEED)
        directions = checks.integer("directions", directions, 1, MAX_DIRECTIONS)
        drop = checks.number("drop", drop, 0.0, 1.0, open_high=True)
        checks.choice("perturb", perturb, PERTURB)
        self.rounding = checks.choice("rounding", rounding, ("auto", *ROUNDINGS))
        checks.choice("sync", sync, SYNC)
        if not isinstance(strict, bool):
            raise TypeError(f"strict: expected a bool, got {type(strict).__name__}")
        self._doubts = doubts = Doubts(strict)
        self.backend, self._ranks = backend, ranks_of(parallel)
        if self._ranks is not None:
            self._ranks.check_directions(directions)
        self._estimator = TwoSided() if estimator is None else estimator
        self._trained = Trained(params, blocks, drop, doubts)

        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "decay_all": False, "sparsity": sparsity}
        check_group(defaults, "")
        super().__init__(self._trained.parameters(params), defaults)

        self._trained.start(self.param_groups)
        splits = self._ranks is not None and self._ranks.how.split == "directions"
        self._perturbation = Perturbation(self._trained.module, perturb, execution_device, splits, doubts)
        self._perturbation.choose(trainable(self.param_groups))
        self._closures = Closures(doubts, self._trained.module)
        parts = self._trained, self._perturbation, self._estimator, self._ranks
        self._run = Run(type(self).__name__, seed, directions, sync, doubts, *parts)
        if trajectory is not None:
            self.record_to(trajectory)
        self._prepare()

    @attempted
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step: evaluate two losses a direction, then update the weights.

        Args:
            closure: returns the loss, a scalar tensor or a number; called 2 * directions times, without gradients. It
                should be deterministic within a step (same batch, same dropout). In-forward perturbation reaches the
                modules that it calls; should it read a weight elsewhere, that is noticed, in whichever call: a weight
                that another module's forward reads is perturbed for that forward, and the closure is called once more;
                one that is read outside of all modules is an error (docs/exactness.md). It may not write to trained
                weights, which in place are perturbed at that moment.

        Returns:
            The mean of the losses seen, as a tensor if the closure returns tensors, else a float.

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
        return self._take(closure=closure)

    def _take(self, **closures: Closure | None) -> Any:
        """A step of any estimator."""
        run, progress = self._run, self._run.progress
        assert progress is not None
        with nullcontext() if self._ranks is None else self._ranks.telling(run.steps):
            step = self._begin(progress, *(check_closure(name, closure) for name, closure in closures.items()))
        estimate = self._estimator.estimate(step)  # losses at θ ± ε z_k, and g_k
        estimate.update(run.taking(progress, estimate, step.eps))  # θ <- decay θ - lr / n sum_k g_k z_k, and the record
        run.taken(progress, step.weights)
        return estimate.losses.mean(self._ranks is not None)

    def _begin(self, progress: Progress, *closures: Closure) -> Step:
        """Check and prepare what a step needs, before anything moves."""
        run, groups = self._run, self.param_groups
        eps, rates, weight_decays = eps_of(groups), rates_of(groups), weight_decays_of(groups)
        weights = self._prepare()
        run.check_whole(weights)
        weights.reach.check_eps(eps)
        self._estimator.begin(groups, run.recording.changed_by_others(weights))
        self._closures.begin(weights, self._trained.steps)
        run.begin(weights, eps, groups)
        place = self._perturbation.place
        assert place is not None
        return Step(
            weights,
            closures,
            eps,
            rates,
            weight_decays,
            groups,
            run.draws(),
            place,
            self._closures,
            self._ranks,
            agreed=[] if self._ranks is None else run.agreed(groups),
            note_probes=partial(setattr, progress, "probes"),
            note_writes=partial(run.note_writes, weights, eps, groups),
            guarded=self._trained.steps == 0,
            watch=self._watches(),
        )

    def _watches(self) -> bool:
        """Whether this step looks for weights that are read outside of their module even if nothing points to it."""
        return drawn(self._run.seed, self._run.steps)

    def _prepare(self) -> Weights:
        """The tables, built anew if a parameter was frozen, unfrozen, moved, cast or added since they were built."""
        trained, estimator, groups = self._trained, self._estimator, self.param_groups
        if trained.follow(groups):
            estimator.forget()
        if (weights := trained.current(groups)) is not None:
            return weights
        self._perturbation.settle()
        self._perturbation.choose(trainable(groups))
        if trained.are_others(groups):
            estimator.forget()
        found = trained.find(groups)
        anchors = estimator.anchors(found, self.state)
        weights = trained.build(
            found,
            groups,
            anchors,
            stochastic=self.rounding != "nearest",
            keep_masks=self._perturbation.name == "in_place" or anchors is not None,
            backend=self.backend,
            copied_to=self._perturbation.execution_device,
        )
        self._perturbation.use(weights)
        if estimator.rebuilt(weights, self._run.recording.changed_by_others(weights)):
            self._run.recording.note_versions(weights)
        trained.use(weights, groups)
        return weights

    @property
    def refused_steps(self) -> int:
        return self._run.refused + self._run.recording.refused_unseen

    @property
    def projected_gradients(self) -> list[float]:
        return self._run.projected_gradients()

    @property
    def bytes_sent(self) -> int:
        return 0 if self._ranks is None else self._ranks.bytes_sent

    @property
    def trajectory(self) -> Trajectory:
        return self._run.recording.trajectory

    @property
    def trajectory_path(self) -> Path | None:
        return self._run.recording.path

    def record_to(self, path: str | Path) -> None:
        """Write the trajectory to a new file: the steps so far, and every later step as it is taken. Of several ranks
        that take steps together the first one writes it.

        One write appends a step, so the file holds it even if the process is killed right after. Whether it survives a
        power cut depends on the option `sync`. No other process can write the file meanwhile.

        Raises:
            TypeError: it is no path.
            ValueError: the file exists, or its folder does not.
        """
        if self._ranks is None or self._ranks.is_first:
            self._run.recording.write_to(path)

    @alone("resume")
    def resume(
        self, path: str | Path, *, weights: str = "first", missing_ok: bool = False, recover: bool = False
    ) -> None:
        """Go on with a run that was cut off, and append to its trajectory's file. An incomplete last record,
        which a killed process or a full disk leaves, is cut off. Of several ranks that take steps together the first
        one reads and writes the file; their number may have changed.

        The next step is the one that the run would have taken, if the optimizer was made with the run's options. Seed,
        directions, drop, thresholds (and MeZO-SVRG's shared_direction) come from the file. Eps, weight decay, perturb
        and rounding do not; a warning says which of them differ. Nor do learning rates: set the scheduler to
        `step_count`, and the data to the same place.

        Args:
            path: the file.
            weights: which weights the parameters hold. "first": those that the run started with; the file is replayed
                onto them. "last": those after its last step, from a checkpoint; load the optimizer's `state_dict`
                first. The next replay of the file notices if they are others.
            missing_ok: if there is no such file, begin it (`record_to`) instead of raising FileNotFoundError. A program
                that does this at its start goes on with its run, however often it is started.
            recover: if the file is damaged, or from some record on of a newer version, go on after its longest sound
                beginning. The rest is moved to a file beside it (run.zo.damaged-1), and a warning says where it is and
                how many steps are gone.

        Raises:
            OSError: it cannot be read or written, or another process writes it (BlockingIOError).
            ValueError: this optimizer has taken other steps already, writes another file, is of another method, or its
                parameters are not those that the run started with (see `zo_kernels.replay`); or the file is damaged, of
                a newer version or no trajectory. The message says where, and what to do. File, weights and optimizer
                are unchanged, unless the replay arrives at other weights than the run had (somebody changed them on the
                way, unnoticed, or a machine computed wrong): then the parameters hold these.
        """
        options = self.param_groups, self.state, self._prepare, self.backend, self.rounding != "nearest"
        Resume(self._run, *options)(path, weights, missing_ok, recover)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """For forwards between steps, such as evaluations: with `execution_device` modules run there, on copies of
        their weights. Without it nothing happens. No gradients are computed within.

            with opt.streaming():
                logits = model(**batch_on_the_device).logits
        """
        place = self._ready_to_stream()
        with torch.no_grad(), place.unperturbed():
            yield

    @alone("streaming")
    def _ready_to_stream(self) -> Place:
        self._prepare()
        place = self._perturbation.place
        assert place is not None
        return place

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
        if (reason := self._why_steps_differ() or cannot_be_graphed(self._prepare().theta[0].device)) is not None:
            raise ValueError(f"graphed: expected an optimizer whose steps can be captured, but {reason}; use opt.step")
        return GraphedStep(self, closure, warmup, same_bits)

    def _why_steps_differ(self) -> str | None:
        """Why not all steps launch the same kernels; None if they do."""
        if self._ranks is not None:
            return "ranks exchange their losses in every step"
        if self._perturbation.execution_device is not None:
            return "with execution_device, weights are copied to where the forward runs in every step"
        return self._estimator.why_steps_differ or (
            "with drop, every step changes other weights" if self.drop else None
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the new parameters take part from the next step on. Parameters of
        the module that the optimizer was given need no names: they have those that they have there.

        Raises:
            ValueError: a key is no option of a group.
        """
        made = hasattr(self, "_run")  # if not, the base class is adding the first groups
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            where = f"param_groups[{len(self.param_groups)}]: "
            self._estimator.fill_group(param_group)
            check_keys(param_group, [*self.defaults, *self._estimator.group_options], where)
            check_group({**self.defaults, **param_group}, where)
            if made:
                self._trained.name(param_group, where, self.perturb == "in_forward")
        super().add_param_group(param_group)
        if made:
            self._trained.derive(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, and under "zo" what the run needs to go on bit for bit."""
        self._run.recording.sync()
        return {**super().state_dict(), "zo": state.saved(self._run, self.param_groups, self.state)}

    @alone("load_state_dict")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a run: the next step draws what it would have drawn. The state's options replace those that this
        optimizer was made with: lr, eps, weight_decay, sparsity, seed, directions, drop, and MeZO-SVRG's. How a step is
        computed stays this optimizer's choice: perturb, rounding, backend, parallel.

        Raises:
            TypeError, ValueError: the state is of another kind of optimizer or of a newer zo_kernels, its parameters
                have other ids (names), or a value in it cannot be, which the message names. Nothing is changed, nor is
                anything if a hook raises.
        """
        if "zo" not in checks.mapping("state_dict", state_dict):
            raise ValueError("state_dict: expected the state of a zeroth-order optimizer, got one without 'zo'")
        given: Any = {key: value for key, value in state_dict.items() if key != "zo"}
        hooks = self.__dict__.get("_optimizer_load_state_dict_pre_hooks", {})
        for hook in hooks.values():  # which torch calls when it is too late to check what they make of the state
            if (changed := hook(self, given)) is not None:
                given = changed
        run, groups, trained = self._run, self.param_groups, self._trained
        found = state.checked(run, state_dict["zo"], groups, self.state)
        kept = state.check_torch(given, groups, self._estimator.check_group)
        self._estimator.check_kept(kept, found, groups, trained.names)
        with state.undone_if_it_fails(run, self):
            self._optimizer_load_state_dict_pre_hooks = type(hooks)()
            super().load_state_dict(given)
            self._optimizer_load_state_dict_pre_hooks = hooks
            if state.take(run, found, self.param_groups, self.state):
                self._write_theta()
            run.recording.forget_versions()  # the model may be loaded after its optimizer

    def _write_theta(self) -> None:
        """Let the estimator write θ as a loaded state has it."""
        theta = [(t, t.detach().clone()) for t in map(local, trainable(self.param_groups))]
        try:
            self._prepare()
        except BaseException:
            with torch.no_grad(), signals_held():
                for t, values in theta:
                    t.copy_(values)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "step"}  # a scheduler's wrapper is bound to the original
