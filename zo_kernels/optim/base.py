"""The base of all zeroth-order optimizers: a thin `torch.optim` layer over the parts of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import device, nn

from .. import checks, spec
from ..closures.losses import Closure, check_closure
from ..closures.watch import Closures
from ..estimators.draws import MAX_DIRECTIONS
from ..estimators.normalize import RMS
from ..estimators.protocol import Estimator, Step
from ..estimators.spsa import chosen
from ..ops import ROUNDINGS
from ..perturbation.choice import PERTURB, Perturbation
from ..perturbation.place import Place
from ..ranks.parallel import Parallel, ranks_of
from ..runs import state
from ..runs.attempt import alone, attempted
from ..runs.graphed import GraphedStep, cannot_be_graphed
from ..runs.resuming import Resume
from ..runs.run import Progress, Run
from ..trajectory import Trajectory
from ..trajectory.recorder import SYNC
from ..warn import Warner
from ..weights.groups import check_group, check_keys, eps_of, rates_of, weight_decays_of
from ..weights.tables import Weights
from ..weights.trained import Trained, trainable


def held_by(part: str, name: str, *, fixed: bool = False) -> Any:
    """Return a property that reads the attribute `name` of one of the optimizer's parts, and writes it unless fixed."""
    read = property(lambda self: getattr(getattr(self, part), name))
    return read if fixed else read.setter(lambda self, value: setattr(getattr(self, part), name, value))


class ZeroOrderOptimizer(torch.optim.Optimizer):
    """The base of all methods: SPSA along random directions that are regenerated from seeds, never stored.

    Each step draws n directions z_k, of normals or of random signs. With L the closure's loss (MeZO, arXiv 2305.17333),

        g_k = (L(θ + ε z_k) - L(θ - ε z_k)) / 2ε, or one-sided (L(θ + ε z_k) - L(θ)) / ε
        θ  <- (1 - lr * weight_decay) θ - lr / (n D) * sum_k g_k z_k,   D = 1 unless it is normalized

    *In place*, a fused pass moves the weights to each loss away from θ, and one more restores and updates at once. Each
    pass rounds, so 16-bit weights drift. *In the forward*, each module runs on a perturbed copy of its weights, in a
    buffer that the next module reuses, and only the update writes θ. docs/exactness.md has measurements of both.

    Args:
        params: a module (the optimizer then notices parameters that come and go), or what `torch.optim` takes:
            parameters, named parameters, groups. Steps change them in place; parameters that do not require grad are
            left alone. A parameter's noise depends on its qualified name, or on its position if it has no name.
        lr: learning rate.
        eps: ε, the same for all groups.
        weight_decay: decoupled. Normalisation layers and parameters of fewer than two dimensions have none, unless
            their group has `decay_all=True`.
        seed: 64-bit seed of the run.
        directions: how many random directions each step averages (n).
        estimator: "two_sided", 2n forwards; or "one_sided", n + 1 forwards, of which one is at θ. See `FZOO`.
        normalize: what the learning rate is divided by (D): "none"; "std", the standard deviation over the step's g_k;
            "rms", a running root mean square of g, or a `zo_kernels.RMS` with its numbers.
        sparsity: fraction of each tensor that is left alone: weights with |θ| <= h take part, where h is the exact
            percentile at the first step. See `SparseMeZO`, also for tensors that stay dense.
        mask: "redrawn": each step takes the mask |θ| <= h from its weights; "kept": the run keeps that of its first
            step, one bit a weight. See `SparseMeZO`.
        drop: fraction of the transformer blocks that each step leaves alone; each step draws them again. See `LeZO`.
        blocks: the transformer blocks; None to find them (`optim.blocks.find_blocks`).
        perturb: "in_place"; "in_forward", which needs a module that is not compiled; "auto": in the forward for 16-bit
            weights of a module, else in place, with a warning if the weights have 16 bits.
        execution_device: the device that forwards run on, if the weights are elsewhere, such as on a CPU because they
            do not fit a GPU. Each module's parameters are copied there just before it runs, and updated where they are.
            Buffers move there for good, and parameters on the CPU move to pinned memory. Forwards between steps need
            `streaming()`.
        rounding: how 16-bit weights are rounded: "nearest", "stochastic", or "auto", which is stochastic.
        distribution: "normal", z_k ~ N(0, I); or "rademacher", whose elements are -1 or +1 with probability 1/2 each
            (Spall 1992, IEEE TAC 37(3)) and cost less. E[z zᵀ] = I for both.
        trajectory: path of a new file; every step is appended to it.
        sync: when the file is forced to the disk, so that it survives a power cut: "step" (costs milliseconds a step),
            "checkpoint" (by `state_dict()` and at the end), "never". It survives a killed process in any case.
        parallel: how ranks of a torch.distributed process group share a step: "batch" (each evaluates its part of the
            batch), "directions" (each evaluates its part of the directions), "off", "auto" ("batch" if there are
            several ranks), or a `zo_kernels.Parallel`. All ranks must make equal optimizers of equal weights.
        backend: see `zo_kernels.add_noise_`.
        strict: raise ValueError where the optimizer would warn that the run is going wrong.

    A group may have its own `lr`, `eps`, `weight_decay`, `decay_all` and `sparsity`; any other key is an error. The
    attributes `estimator`, `normalize`, `distribution` and `mask` are those of the run, and cannot be written.

    Attributes:
        step_count, refused_steps: steps taken, and skipped ones of them (see `step`). Reading refused_steps or one of
            the next two waits for a GPU.
        projected_gradients: g_k of the last step; zeros if it was skipped.
        trajectory: the record of the run, a `zo_kernels.Trajectory`; `zo_kernels.replay` rebuilds weights from it.
        trajectory_path: the file that it is written to; None if there is none, or if another rank writes it.
        bytes_sent: bytes that this rank sent to each of the others: 32 a step, 16 a direction of its own, and 64 or
            more whenever options change.

    Raises:
        TypeError, ValueError: an argument is out of range, or a parameter cannot be trained; the message names it.
    """

    perturb: str = held_by("_perturbation", "name")
    seed: int = held_by("_run", "seed")
    directions: int = held_by("_run", "directions")
    estimator: str = held_by("_estimator", "name", fixed=True)
    normalize: str = held_by("_estimator", "normalize", fixed=True)
    drop: float = held_by("_trained", "drop")
    rounding: str = held_by("_trained", "rounding")
    distribution: str = held_by("_trained", "distribution", fixed=True)
    mask: str = held_by("_trained", "mask", fixed=True)
    backend: str | None = held_by("_trained", "backend")
    step_count: int = held_by("_run", "steps")
    refused_steps: int = held_by("_run", "refused_steps")

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        directions: int = 1,
        estimator: str = "two_sided",
        normalize: str | RMS = "none",
        sparsity: float = 0.0,
        mask: str = "redrawn",
        drop: float = 0.0,
        blocks: Sequence[nn.Module] | None = None,
        perturb: str = "auto",
        execution_device: device | str | None = None,
        rounding: str = "auto",
        distribution: str = "normal",
        trajectory: str | Path | None = None,
        sync: str = "checkpoint",
        parallel: str | Parallel = "auto",
        backend: str | None = None,
        strict: bool = False,
        _estimator: Estimator | None = None,
    ):
        seed = checks.integer("seed", seed, 0, checks.MAX_SEED)
        directions = checks.integer("directions", directions, 1, MAX_DIRECTIONS)
        drop = checks.number("drop", drop, 0.0, 1.0, open_high=True)
        checks.choice("perturb", perturb, PERTURB)
        checks.choice("rounding", rounding, ("auto", *ROUNDINGS))
        checks.choice("distribution", distribution, spec.DISTRIBUTIONS)
        checks.choice("sync", sync, SYNC)
        checks.boolean("strict", strict)
        self._warner = warner = Warner(strict)
        self._ranks = ranks_of(parallel)
        if self._ranks is not None:
            self._ranks.check_directions(directions)
        self._estimator = chosen(estimator, normalize, directions, _estimator)
        self._trained = Trained(params, blocks, drop, rounding, distribution, mask, backend, warner)
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "decay_all": False, "sparsity": sparsity}
        check_group(defaults, "")
        splits = self._ranks is not None and self._ranks.how.split == "directions"
        self._perturbation = Perturbation(self._trained.module, perturb, execution_device, splits, warner)
        self._closures = Closures(warner, self._trained.module)
        parts = self._trained, self._perturbation, self._estimator, self._ranks
        self._run = Run(type(self).__name__, seed, directions, sync, warner, *parts)
        super().__init__(self._trained.parameters(params), defaults)  # all parts are there when it adds the groups

        self._trained.start(self.param_groups)
        self._perturbation.choose(trainable(self.param_groups))
        if trajectory is not None:
            self.record_to(trajectory)
        self._prepare()

    @attempted
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step: evaluate two losses a direction, then update the weights.

        Args:
            closure: returns the loss, a scalar tensor or a number. It is called 2 * directions times, one-sided
                directions + 1 times, without gradients. All calls of a step must compute the same function (same batch,
                same dropout), and may not write to trained weights. In the forward, a weight may also be read by a
                module that does not own it: the step notices, perturbs it there too, and calls the closure once more.
                A weight that is read where no module runs is an error (docs/exactness.md).

        Returns:
            The mean of the losses (one-sided: that at θ): a tensor if the closure returns tensors, else a float.

        Warns:
            UserWarning: once for each reason; a ValueError if `strict`. The losses are too coarse for ε: they have 16
                bits, or those of a step are equal in 20 steps in a row, or differ by a few representable numbers in 10.
                Dropout draws other numbers in each. Batch normalisation is in training mode. The closure draws another
                batch in each call (steps 1, 2, 3, 5, 9, ... call it once more to find out). A weight has a `.grad`,
                which the optimizer does not read. Losses on a GPU are checked a few steps later.

        Raises:
            TypeError, ValueError: the closure returned no finite scalar, its losses are too far apart, or the update
                might make a weight infinite (lr |g| above 1e30, for float16 1024; lr * weight_decay above 2). The step
                is skipped and counted in `refused_steps`; the weights are restored. If losses are on a GPU, the device
                skips such a step, and nothing is raised.
            ValueError: a weight is read where it cannot be perturbed; the closure writes to a weight that is perturbed
                in place (the first step stops the write; later steps find it afterwards, and you must load the weights
                again); or the module lost or gained trained parameters. The message names the weight.
            RuntimeError: another thread is in a step of this optimizer, or the closure calls `step`.
            OSError: the trajectory's file cannot be written. The step was taken; the next one writes what is missing.

        If the closure raises, or you press Ctrl-C, the weights are restored: up to the rounding of passes in place,
        exactly in the forward.
        """
        return self._take(closure=closure)

    def _take(self, **closures: Closure | None) -> Any:
        """Take a step with any number of closures, as the estimator wants them."""
        run, progress = self._run, self._run.progress
        assert progress is not None
        with nullcontext() if self._ranks is None else self._ranks.reporting_errors(run.steps):
            step = self._begin(progress, *(check_closure(name, closure) for name, closure in closures.items()))
        estimate = self._estimator.estimate(step)  # losses around θ, and g_k
        estimate.update(run.taking(progress, estimate, step.eps))  # θ <- decay θ - lr / n sum_k g_k z_k, and the record
        run.taken(progress, step.weights)
        return estimate.losses.mean(self._ranks is not None)

    def _begin(self, progress: Progress, *closures: Closure) -> Step:
        """Check and prepare all that a step needs, before anything moves."""
        run, groups = self._run, self.param_groups
        eps, rates, weight_decays = eps_of(groups), rates_of(groups), weight_decays_of(groups)
        self._estimator.check_options(groups)
        weights = self._prepare()
        run.check_whole(weights)
        weights.reach.check_eps(eps)
        self._estimator.begin(run.recording.changed_by_others(weights))
        self._closures.begin(weights, self._trained.steps)
        run.begin(weights, eps, groups)
        place = self._perturbation.place
        assert place is not None
        return Step(
            weights=weights,
            closures=closures,
            eps=eps,
            rates=rates,
            weight_decays=weight_decays,
            draws=run.draws(),
            place=place,
            watch=self._closures,
            ranks=self._ranks,
            agreed=[] if self._ranks is None else run.agreed(groups),
            note_probes=partial(setattr, progress, "probes"),
            note_writes=partial(run.note_writes, weights, eps, groups),
            guarded=self._trained.steps == 0,
        )

    def _prepare(self) -> Weights:
        return self._run.prepare(self.param_groups, self.state)

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
        """Write the trajectory to a new file: the steps so far, and every later step as it is taken.

        One write appends a step, so the file holds it even if the process is killed right after; `sync` says when it
        also survives a power cut. No other process can write the file. The first of several ranks writes it.

        Raises:
            TypeError: `path` is no path.
            ValueError: the file exists, or its folder does not.
        """
        if self._ranks is None or self._ranks.is_first:
            self._run.recording.write_to(path)

    @alone("resume")
    def resume(
        self, path: str | Path, *, weights: str = "first", missing_ok: bool = False, recover: bool = False
    ) -> None:
        """Go on with a run that was cut off, and append to its trajectory's file.

        The next step is the one that the run would have taken. Seed, directions, drop, distribution, thresholds (and
        MeZO-SVRG's shared_direction) come from the file; eps, weight decay, perturb and rounding are this optimizer's,
        with a warning if they differ. Set the scheduler and the data to `step_count` yourself. The first of several
        ranks reads and writes the file; their number may change. The incomplete last record of a killed run is cut.

        Args:
            path: the file.
            weights: which weights the parameters hold. "first": those the run started with; the file is replayed onto
                them. "last": those after its last step, from a checkpoint; load the optimizer's `state_dict` first.
            missing_ok: begin the file (`record_to`) if there is none. A program that always does this continues its
                run however often it is started.
            recover: if the file is damaged, go on after its longest sound beginning. The rest is moved to a file beside
                it (run.zo.damaged-1), and a warning says where it is and how many steps are lost.

        Raises:
            OSError: the file cannot be read or written, or another process writes it (BlockingIOError).
            ValueError: this optimizer has taken steps, writes another file, or is of another method; the parameters do
                not hold the weights that the run started with; the file is damaged, newer, or no trajectory. Nothing
                is changed, unless the replay arrives at other weights than the run: then the parameters hold them.
        """
        Resume(self._run, self.param_groups, self.state)(path, weights, missing_ok, recover)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Run forwards between steps, such as evaluations, on `execution_device`, without gradients.

        Modules within the block run on copies of their weights there. Without `execution_device` they run as usual.

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
        """Capture the launches of a step in a CUDA graph, for models whose time goes into launches.

        Calling the result takes a step as `step(closure)` would, bit for bit: counted, recorded, with the current
        learning rates, weight decay and seeds. The closure itself runs in the first `warmup` steps and for the
        capture. Later steps repeat what the device did then, so the closure must always read its batch from the same
        tensors (`batch.copy_(next_batch)`). If ε, directions or trained weights change, an ordinary step and another
        capture follow. A model may take another path while it is captured, as transformers does by an attention mask:
        so before a capture the closure runs twice more, once captured, and its operations and losses are compared.

        Args:
            closure: as for `step`; its losses are tensors on the device.
            warmup: ordinary steps before the capture, at least 1.
            same_bits: raise if the captured closure does not do what the ordinary one does. False: compare nothing;
                the captured path's losses are used and recorded, so the trajectory still gives the weights.

        Raises:
            TypeError, ValueError: an argument is wrong, or steps launch different kernels (`drop`, MeZO-SVRG).
        """
        check_closure("closure", closure)
        checks.integer("warmup", warmup, 1)
        checks.boolean("same_bits", same_bits)
        if (reason := cannot_be_graphed(self._run, self._prepare().theta[0].device)) is not None:
            raise ValueError(f"graphed: expected an optimizer whose steps can be captured, but {reason}; use opt.step")
        return GraphedStep(self, closure, warmup, same_bits)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters from the next step on, as `torch.optim.Optimizer.add_param_group` does.

        If the optimizer was given a module, the module's parameters keep their names there.

        Raises:
            ValueError: a key is no option of a group.
        """
        made = self._trained.started  # if not, the base class is adding the first groups
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
        """Return `torch.optim.Optimizer.state_dict`, and under "zo" all that the run needs to go on bit for bit."""
        self._run.recording.sync()
        return state.whole(self._run, super().state_dict(), self.param_groups, self.state)

    @alone("load_state_dict")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a run: the next step draws the directions that the run's next step would have drawn.

        The state's lr, eps, weight_decay, sparsity, seed, directions, drop, distribution and MeZO-SVRG's options
        replace this optimizer's. Its own perturb, rounding, backend and parallel stay: they say how steps are computed.

        Raises:
            TypeError, ValueError: the state is of another kind of optimizer or of a newer zo_kernels, its parameters
                have other ids (names), or a value in it is invalid; the message names it. Nothing is changed.
        """
        state.load(self._run, self, state_dict, super().load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "step"}  # a scheduler's wrapper is bound to the original
