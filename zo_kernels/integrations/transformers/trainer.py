"""`transformers.Trainer` with training steps that need forward passes only."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
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
from zo_kernels.integrations.transformers.anchors import ANCHOR_SLOT, RATE_SLOT, anchor_batches
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
    """A `transformers.Trainer` that trains with forward passes only, by an optimizer of `zo_kernels`.

        args = ZOTrainingArguments(output_dir="runs/mine", method="mezo", learning_rate=1e-6, max_steps=2000)
        trainer = ZOTrainer(model=model, args=args, train_dataset=train, eval_dataset=dev)
        trainer.train()

    `model` is a transformers model, and `train` and `dev` are tokenised datasets with labels, just as for
    `transformers.Trainer`. Pass `processing_class=tokenizer` as well, so that batches of different lengths are padded.
    Everything outside a step is the Trainer's own: data, schedules, logging, callbacks, evaluation, checkpoints.

    A step evaluates the loss twice for each direction and builds no graph. All micro-batches of a step share its
    directions, and modules are in evaluation mode during a step. The step is taken inside the `training_step` of the
    last micro-batch, so the callback `on_pre_optimizer_step` comes after the step.

    Args:
        model, args, ...: as for `transformers.Trainer`, but `args` must be `ZOTrainingArguments`, and an optimizer
            passed in `optimizers` must be one of `zo_kernels`.
        objective: what to minimise instead of the loss. Either a function of the model, the inputs of a batch and the
            outputs of the model that returns a scalar, which is averaged over the micro-batches of a step; or a name
            as in `args.objective`. It overrides `args.objective`.

    Raises:
        TypeError, ValueError: an option needs gradients, or cannot work without them; the message says what to do
            instead.
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
        """The optimizer without accelerate's wrapper. None before `train`, unless one was passed."""
        held: Any = self.optimizer
        return getattr(held, "optimizer", held)

    def _check_optimizer(self) -> None:
        if self.optimizer is not None and not isinstance(self.zo_optimizer, zo.ZeroOrderOptimizer):
            raise TypeError(
                f"optimizers: expected an optimizer of zo_kernels, got {type(self.zo_optimizer).__name__}, which needs "
                "gradients; choose one by args.method"
            )

    def _check_devices(self) -> None:
        """Check what the launcher or the machine chose, which `args` do not show."""
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
        """As `Trainer`, but model and optimizer are not prepared for a backward pass."""
        super().create_accelerator_and_postprocess()
        # Keeps autocast and torch.compile, leaves out DistributedDataParallel.
        placed = False if self.args.offload else None
        prepare = functools.partial(self.accelerator.prepare_model, evaluation_mode=True, device_placement=placed)
        self.accelerator.prepare_model = prepare
        self.accelerator.prepare_optimizer = _prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that `args` describe, unless there is one. All processes get the weights of the first."""
        trained: Any = self.model if model is None else model
        self._share_weights(trained)
        if self.optimizer is None:
            self.optimizer, self._made_optimizer = make_optimizer(trained, self.args), True
        self._check_optimizer()
        return self.optimizer

    def prediction_step(self, model: nn.Module, *more: Any, **options: Any) -> Any:
        """As `Trainer`. Offloaded weights are streamed to the device.

        The loss is the mean over this batch alone, since the Trainer weights it by the number of examples.
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
        """As `Trainer`. Random numbers drawn in an evaluation do not change the training batches."""
        with nullcontext() if self._data is None else self._data.undisturbed():
            return super().evaluation_loop(*args, **options)

    def find_lr(self, *, steps: int | None = None, **options: Any) -> zo.FoundLR:
        """Find a learning rate for the method and the options of `args` by short runs; see `zo_kernels.find_lr`.

            trainer.args.learning_rate = trainer.find_lr().lr
            trainer.train()

        Each step draws as many examples as one of `train`. The weights stay as they are, bit for bit, and so does
        `args`. All processes call it together.

        Args:
            steps, options: `steps`, `start` and `most` of `zo_kernels.find_lr`.

        Raises ValueError if an optimizer was passed or made before, if the training data have no length and indices,
        and as `zo_kernels.find_lr` does.
        """
        if self.optimizer is not None:
            raise ValueError(
                "optimizers: expected none yet, whose learning rate could be found, got "
                f"{type(self.zo_optimizer).__name__}; call find_lr before train, or zo_kernels.find_lr for one of "
                "your own"
            )
        model: Any = self.model
        args, loader = self.args, self.get_train_dataloader()
        examples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.zo_seed is None else args.zo_seed

        def make(model: nn.Module, lr: float) -> zo.ZeroOrderOptimizer:
            self.optimizer = make_optimizer(model, args, lr=lr)  # where closures look for it
            return self.zo_optimizer

        def closures() -> Iterator[tuple[Callable[[], Tensor], ...]]:
            for step in itertools.count():
                of_step = [self._drawn_closure(model, loader, examples, seed, step, RATE_SLOT)]
                if args.method == "mezo-svrg":
                    of_anchor = args.anchor_examples or DEFAULT_ANCHOR_EXAMPLES
                    of_step.append(self._drawn_closure(model, loader, of_anchor, seed, step))
                yield tuple(counted_once(self, of_step))

        self._share_weights(model)
        tokens = getattr(self, "_total_train_tokens", None)
        try:
            with evaluation_mode(model):
                return zo.find_lr(model, closures, optimizer=make, steps=steps, **options)
        finally:
            self.optimizer = None
            if tokens is not None:
                self._total_train_tokens = tokens

    def _share_weights(self, model: nn.Module) -> None:
        """Give all processes the weights of the first, since each initialises a new head at random."""
        if self.accelerator.num_processes > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)

    def train(self, resume_from_checkpoint: str | bool | None = None, *more: Any, **options: Any) -> Any:
        """As `Trainer.train`. A resumed run continues bit for bit from its last complete checkpoint."""
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = checkpoints.last_whole(self._folder()) or True  # True: Trainer complains
            if self._made_optimizer:
                self.optimizer = None  # from an earlier call; its trajectory is about to be replaced
        self._data = None
        try:
            return super().train(resume_from_checkpoint, *more, **options)
        finally:
            self._data = None  # it holds what cannot be copied

    def get_batch_samples(self, epoch_iterator: Any, *more: Any, **options: Any) -> Any:
        """As `Trainer`, but the random numbers drawn while reading depend only on the seed and the epoch.

        Micro-batches of a step that the end of an epoch cut off are dropped. Returns no batches once all steps are
        taken: otherwise a run resumed at its end would take one more.
        """
        self._microbatches = []
        if self.is_in_train and self.state.global_step >= self.state.max_steps:
            return [], None
        loader = self.callback_handler.train_dataloader
        if loader is None:  # in the loop of a subclass
            return super().get_batch_samples(epoch_iterator, *more, **options)
        if self._data is None:
            self._data = TrainingData(resumed.seed_of_data(self.args))
        batches = self._data.reading(epoch_iterator, loader)
        if not self._data.is_as_it_was:
            self._data.is_as_it_was = True
            self.zo_optimizer._warner.warn("resumed data", resumed.OTHER_DATA)
        return super().get_batch_samples(batches, *more, **options)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a micro-batch. With the last one of a step, take the step.

        Returns:
            A scalar on the device: the mean of the step's losses, or that of the step before if the step was refused.
            0 for all but the last micro-batch.
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
        asked.training = True  # also after the step, as Trainer leaves it: logs depend on it
        with evaluation_mode(model, asked):
            loss = self._take_step(optimizer, counted_once(self, closures))
        if (every := self.args.torch_empty_cache_steps) and self.state.global_step % every == 0:
            clear_device_cache()
        seen = torch.as_tensor(loss, dtype=torch.float32, device=self.args.device)
        # A single nan would stay in the Trainer's sum of losses.
        self._last_loss = torch.where(seen.isfinite(), seen, self._last_loss)
        return self._last_loss

    def _take_step(self, optimizer: zo.ZeroOrderOptimizer, closures: Sequence[Callable[[], Tensor]]) -> Tensor | float:
        try:
            loss = optimizer.step(*closures)
        except OutOfRange:
            loss = math.nan
        # The check waits for a GPU, so it is made less often there.
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
        examples = self.args.anchor_examples or DEFAULT_ANCHOR_EXAMPLES
        loader: Any = self.callback_handler.train_dataloader
        return self._drawn_closure(model, loader, examples, optimizer.seed, optimizer.step_count)

    def _drawn_closure(
        self, model: nn.Module, loader: Any, examples: int, seed: int, step: int, slot: int = ANCHOR_SLOT
    ) -> Callable[[], Tensor]:
        """The closure of examples that are drawn when it is first called; see `anchor_batches`."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes

        @functools.cache  # most steps never call that of an anchor
        def drawn_closure() -> Callable[[], Tensor]:
            drawn = anchor_batches(loader, examples, seed=seed, step=step, rank=rank, processes=processes, slot=slot)
            batches, num_items = super(ZOTrainer, self).get_batch_samples(iter(drawn), len(drawn), self.args.device)
            return self._closure(model, [self._prepare_inputs(batch) for batch in batches], num_items)

        return lambda: drawn_closure()()

    def _get_grad_norm(self, *args: Any, **options: Any) -> None:
        """Return None, since there is no gradient whose norm could be logged."""

    def log(self, logs: dict[str, float], *more: Any, **options: Any) -> None:
        """As `Trainer`, with more values beside a training loss.

        `projected_gradient` is the root mean square over the directions of the last step, `refused_steps` counts those
        of the run, and `bytes_sent`, with several processes, the bytes that they sent each other.
        """
        if "loss" in logs and isinstance(self.zo_optimizer, zo.ZeroOrderOptimizer):
            gradients = self.zo_optimizer.projected_gradients
            logs["projected_gradient"] = math.sqrt(sum(g * g for g in gradients) / max(len(gradients), 1))
            logs["refused_steps"] = self.zo_optimizer.refused_steps
            if self.accelerator.num_processes > 1:
                logs["bytes_sent"] = self.zo_optimizer.bytes_sent
        super().log(logs, *more, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """As `Trainer`. The card names the zeroth-order method and its options."""
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
        place = None if self._data is None else self._data.place()
        resumed.save(output_dir, self.args, self.zo_optimizer, self._objective, place)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        checkpoints.check_resumable(checkpoint)
        saved, optimizer = resumed.saved(checkpoint, self.args), self.zo_optimizer
        if saved is not None:
            made = {"method": self.args.method} if self._made_optimizer else {}
            resumed.check_unchanged(saved, {**made, "distribution": optimizer.distribution})
        given = resumed.kept_by_state(optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        taken = resumed.given(self.args, optimizer, self._objective)
        resumed.tell_of_changes(optimizer, given, taken, saved)
        self._data = TrainingData(resumed.seed_of_data(self.args), resumed.place_in_data(saved, self.args))
        if self.is_world_process_zero():
            checkpoints.take_back(checkpoint, self._folder())
        with resumed.without_being_told_twice(saved):
            # All processes resume, since processes that step together must read the trajectory together.
            optimizer.resume(self._folder() / checkpoints.TRAJECTORY, weights="last")


def _checked_objective(objective: Any) -> Objective | str:
    if callable(objective) or objective in ("loss", "accuracy"):
        return objective
    raise TypeError(f"objective: expected 'loss', 'accuracy' or a function, got {objective!r}")


def _prepared(optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> SteppedInTrainingStep:
    """Replaces `Accelerator.prepare_optimizer`."""
    return optimizer if isinstance(optimizer, SteppedInTrainingStep) else SteppedInTrainingStep(optimizer)
