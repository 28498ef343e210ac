"""`transformers.Trainer` with a training step of forward passes only."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

import zo_kernels as zo
from zo_kernels.closures.losses import OutOfRange
from zo_kernels.integrations.transformers import card, checkpoints, losses, resumed
from zo_kernels.integrations.transformers.anchors import anchor_batches
from zo_kernels.integrations.transformers.arguments import ZOTrainingArguments
from zo_kernels.integrations.transformers.evaluation import counted_once, evaluation_mode
from zo_kernels.integrations.transformers.objectives import Objective
from zo_kernels.integrations.transformers.optimizers import (
    DEFAULT_ANCHOR_EXAMPLES,
    SteppedInTrainingStep,
    make_optimizer,
    schedule_anchor_rates,
)
from zo_kernels.integrations.transformers.precision import float32_losses
from zo_kernels.integrations.transformers.reading import TrainingData
from zo_kernels.integrations.transformers.refusals import MOST_IN_A_ROW, Refusals

logger = logging.get_logger(__name__)


class ZOTrainer(Trainer):
    """`transformers.Trainer` whose steps are those of a `zo_kernels` optimizer: two evaluations a direction, no graph.

    All that has no part in a step is the Trainer's own: data, schedules, logging, callbacks, evaluation, checkpoints.
    A step is taken at the end of the `training_step` of its last micro-batch; `on_pre_optimizer_step` comes after it.
    Its micro-batches share the directions. The modules are in evaluation mode while it is evaluated.

    Args:
        model, args, ...: as for `transformers.Trainer`; `args` are `ZOTrainingArguments`. An optimizer that is passed
            in `optimizers` is one of `zo_kernels`.
        objective: minimised in place of the loss: a function of the model, a batch's inputs and the model's outputs
            that returns a scalar, whose mean over a step's micro-batches counts; or a name as in `args.objective`,
            which it overrides.

    Raises:
        TypeError, ValueError: what was asked for needs gradients, or cannot be trained without them; the message says
            what to do instead.
        Diverged: by `train`, if 10 steps in a row were refused.
    """

    args: ZOTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: ZOTrainingArguments | None = None,
        *more: Any,
        objective: Objective | str | None = None,
        **options: Any,
    ):
        args = ZOTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, ZOTrainingArguments):
            raise TypeError(f"args: expected ZOTrainingArguments, got {type(args).__name__}")
        if options.get("optimizer_cls_and_kwargs") is not None:
            raise ValueError("optimizer_cls_and_kwargs: expected None; choose the optimizer by args.method")
        self._microbatches: list[Any] = []
        self._refusals: Refusals | None = None
        self._made_optimizer = False
        self._data: TrainingData | None = None
        self._objective = _checked_objective(args.objective if objective is None else objective)
        super().__init__(model, args, *more, **options)
        self._check_optimizer()
        self._check_devices()
        self._last_loss = torch.zeros((), device=args.device)

    @property
    def zo_optimizer(self) -> zo.ZeroOrderOptimizer:
        """The optimizer without what accelerate puts around it; there is none before `train`."""
        held: Any = self.optimizer
        return getattr(held, "optimizer", held)

    def _check_optimizer(self) -> None:
        if self.optimizer is not None and not isinstance(self.zo_optimizer, zo.ZeroOrderOptimizer):
            raise TypeError(
                f"optimizers: expected an optimizer of zo_kernels, got {type(self.zo_optimizer).__name__}, which needs "
                "gradients; choose one by args.method"
            )

    def _check_devices(self) -> None:
        """What a launcher or the machine chose, and `args` therefore do not tell."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu: expected one GPU a process, got {self.args.n_gpu}, to which torch.nn.DataParallel would copy "
                "the model in every forward; start one process for each with torchrun, or hide all but one "
                "(CUDA_VISIBLE_DEVICES)"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.accelerator.scaler is not None:
            raise ValueError(
                "accelerate: expected a configuration without DeepSpeed, FSDP and fp16, which are about gradients; "
                "start the processes with torchrun, or `accelerate launch` without these"
            )
        if self.args.parallel == "off" and self.accelerator.num_processes > 1:
            raise ValueError(
                "parallel: expected 'auto', 'batch' or 'directions' for processes that were started together, got "
                "'off', by which each would train weights of its own; start them one by one instead"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`; neither model nor optimizer will be prepared for a backward pass."""
        super().create_accelerator_and_postprocess()
        # Autocast and torch.compile, but no DistributedDataParallel.
        placed = False if self.args.offload else None
        prepare = functools.partial(self.accelerator.prepare_model, evaluation_mode=True, device_placement=placed)
        self.accelerator.prepare_model = prepare
        self.accelerator.prepare_optimizer = _prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `args` describe, unless there is one. All processes get the weights of the first."""
        trained: Any = self.model if model is None else model
        self._share_weights(trained)
        if self.optimizer is None:
            self.optimizer, self._made_optimizer = make_optimizer(trained, self.args), True
        self._check_optimizer()
        return self.optimizer

    def prediction_step(self, model: nn.Module, *more: Any, **options: Any) -> Any:
        """As `Trainer`; weights that are offloaded are copied to where they are needed.

        The loss is that of the batch by itself, which the Trainer weights by its examples.
        """
        with ExitStack() as within:
            within.enter_context(losses.alone(self))
            within.enter_context(float32_losses(self))
            if self.args.offload:
                if self.optimizer is None:
                    self.create_optimizer()
                within.enter_context(self.zo_optimizer.streaming())
            return super().prediction_step(model, *more, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As `Trainer`; what is drawn in it changes nothing of what is read in training."""
        with nullcontext() if self._data is None else self._data.undisturbed():
            return super().evaluation_loop(*args, **options)

    def _share_weights(self, model: nn.Module) -> None:
        """A head that is not pretrained starts at random, in every process by itself."""
        if self.accelerator.num_processes > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)

    def train(self, resume_from_checkpoint: str | bool | None = None, *more: Any, **options: Any) -> Any:
        """As `Trainer.train`. A run that is resumed goes on bit for bit from its last whole checkpoint."""
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = checkpoints.last_whole(self._folder()) or True  # True: Trainer complains
            if self._made_optimizer:
                self.optimizer = None  # of an earlier call; it writes to a trajectory that is now taken back
        self._data = None
        try:
            return super().train(resume_from_checkpoint, *more, **options)
        finally:
            self._data = None  # it holds what cannot be copied

    def get_batch_samples(self, epoch_iterator: Any, *more: Any, **options: Any) -> Any:
        """As `Trainer`. Micro-batches of a step that an epoch's end has cut off are dropped. What is drawn while they
        are read depends on the seed and the epoch alone.

        None once all steps are taken: a run that is resumed from its end would take one more.
        """
        self._microbatches = []
        if self.is_in_train and self.state.global_step >= self.state.max_steps:
            return [], None
        loader = self.callback_handler.train_dataloader
        if loader is None:  # in a loop of a subclass's own
            return super().get_batch_samples(epoch_iterator, *more, **options)
        if self._data is None:
            self._data = TrainingData(resumed.seed_of_data(self.args))
        batches = self._data.reading(epoch_iterator, loader)
        if not self._data.is_as_it_was:
            self._data.is_as_it_was = True
            self.zo_optimizer._warner.warn("resumed data", resumed.OTHER_DATA)
        return super().get_batch_samples(batches, *more, **options)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a micro-batch; with the last one of a step, take the step.

        Returns:
            The mean of the losses seen, a scalar on the device, or that of the step before if the step was refused; 0
            before the last micro-batch.
        """
        self._microbatches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._microbatches = self._microbatches, []
        optimizer = self.zo_optimizer
        if self.is_world_process_zero() and optimizer.trajectory_path is None:
            self._begin_trajectory(optimizer)
        schedule_anchor_rates(optimizer)
        closures = [self._closure(model, batches, num_items_in_batch)]
        if isinstance(optimizer, zo.MeZOSVRG):
            closures.append(self._full_closure(model, optimizer))
        asked: Any = self.model
        asked.training = True  # after the step, too, as Trainer leaves it: logs are filed by it
        with evaluation_mode(model, asked):
            loss = self._take_step(optimizer, counted_once(self, closures))
        if (every := self.args.torch_empty_cache_steps) and self.state.global_step % every == 0:
            clear_device_cache()
        seen = torch.as_tensor(loss, dtype=torch.float32, device=self.args.device)
        # One nan would stay in the Trainer's sum of losses for good.
        self._last_loss = torch.where(seen.isfinite(), seen, self._last_loss)
        return self._last_loss

    def _take_step(self, optimizer: zo.ZeroOrderOptimizer, closures: Sequence[Callable[[], Tensor]]) -> Tensor | float:
        try:
            loss = optimizer.step(*closures)
        except OutOfRange:
            loss = math.nan
        # Asking waits for a GPU, so there it is asked less often.
        if self.args.device.type == "cpu" or optimizer.step_count % MOST_IN_A_ROW == 0:
            self._refusals_of(optimizer).check()
        return loss

    def _refusals_of(self, optimizer: zo.ZeroOrderOptimizer) -> Refusals:
        if self._refusals is None or self._refusals.optimizer is not optimizer:
            self._refusals = Refusals(optimizer)
        return self._refusals

    def _closure(self, model: nn.Module, batches: Sequence[Any], num_items: Any) -> Callable[[], Tensor]:
        return losses.closure_of(self, model, batches, num_items)

    def _full_closure(self, model: nn.Module, optimizer: zo.MeZOSVRG) -> Callable[[], Tensor]:
        loader: Any = self.callback_handler.train_dataloader

        @functools.cache  # most steps never ask for it
        def closure_of_step() -> Callable[[], Tensor]:
            drawn = anchor_batches(
                loader,
                self.args.anchor_examples or DEFAULT_ANCHOR_EXAMPLES,
                seed=optimizer.seed,
                step=optimizer.step_count,
                rank=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
            )
            batches, num_items = super(ZOTrainer, self).get_batch_samples(iter(drawn), len(drawn), self.args.device)
            return self._closure(model, [self._prepare_inputs(batch) for batch in batches], num_items)

        return lambda: closure_of_step()()

    def _get_grad_norm(self, *args: Any, **options: Any) -> None:
        """None: there are no gradients whose norm could be logged."""

    def log(self, logs: dict[str, float], *more: Any, **options: Any) -> None:
        """As `Trainer`, with more beside a training loss: `projected_gradient` (the last step's, root mean square over
        its directions), `refused_steps` (of the run) and, with several processes, `bytes_sent` (from one to another).
        """
        if "loss" in logs and isinstance(self.zo_optimizer, zo.ZeroOrderOptimizer):
            gradients = self.zo_optimizer.projected_gradients
            logs["projected_gradient"] = math.sqrt(sum(g * g for g in gradients) / max(len(gradients), 1))
            logs["refused_steps"] = self.zo_optimizer.refused_steps
            if self.accelerator.num_processes > 1:
                logs["bytes_sent"] = self.zo_optimizer.bytes_sent
        super().log(logs, *more, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """As `Trainer`; the card names the zeroth-order method and its options."""
        super().create_model_card(*args, **options)
        if self.is_world_process_zero():
            trained: Any = self.model
            optimizer = self.zo_optimizer or make_optimizer(trained, self.args)
            objective = self._objective if isinstance(self._objective, str) else "a function"
            card.tell_of(optimizer, objective, Path(str(self.args.output_dir)) / "README.md")

    def _folder(self) -> Path:
        """Where the checkpoints are; each trial of a hyperparameter search has its own."""
        return Path(self._get_output_dir(getattr(self, "_trial", None)))

    def _begin_trajectory(self, optimizer: zo.ZeroOrderOptimizer) -> None:
        path = self._folder() / checkpoints.TRAJECTORY
        if path.exists():
            checkpoints.set_aside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        optimizer.record_to(path)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.zo_optimizer.trajectory.save(Path(output_dir) / checkpoints.TRAJECTORY)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        resumed.save(output_dir, self.args, self._options(), None if self._data is None else self._data.place())

    def _options(self) -> dict[str, Any]:
        return resumed.given(self.args, self.zo_optimizer, self._objective)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        checkpoints.check_resumable(checkpoint)
        saved, optimizer = resumed.saved(checkpoint, self.args), self.zo_optimizer
        if saved is not None and self._made_optimizer:
            resumed.check_method(saved, self.args)
        given = resumed.kept_by_state(optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        resumed.tell_of_changes(optimizer, given, self._options(), saved)
        self._data = TrainingData(resumed.seed_of_data(self.args), resumed.place_in_data(saved, self.args))
        if self.is_world_process_zero():
            checkpoints.take_back(checkpoint, self._folder())
        with resumed.without_being_told_twice(saved):
            # By all processes: those that take steps together read it together.
            optimizer.resume(self._folder() / checkpoints.TRAJECTORY, weights="last")


def _checked_objective(objective: Any) -> Objective | str:
    if callable(objective) or objective in ("loss", "accuracy"):
        return objective
    raise TypeError(f"objective: expected 'loss', 'accuracy' or a function, got {objective!r}")


def _prepared(optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> SteppedInTrainingStep:
    """In place of `Accelerator.prepare_optimizer`."""
    return optimizer if isinstance(optimizer, SteppedInTrainingStep) else SteppedInTrainingStep(optimizer)
