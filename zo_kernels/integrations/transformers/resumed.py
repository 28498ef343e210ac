"""What a checkpoint stores of a run: its options, to warn of those that have changed, and the place in its data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zo_kernels import ZeroOrderOptimizer, files
from zo_kernels.integrations.transformers.arguments import ZOTrainingArguments

# Those of the arguments that count, whatever the run began with. The others are in the optimizer's state.
_OF_ARGUMENTS = (
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "anchor_examples",
    "dataloader_drop_last", "dataloader_num_workers", "train_sampling_strategy", "group_by_length", "bf16",
    "label_smoothing_factor", "average_tokens_across_devices", "world_size",
)  # fmt: skip

_FIELDS = {"method": (str,), "distribution": (str,), "options": (dict,), "data": (dict, type(None))}
_OF_DATA = {"epoch": (int,), "batches": (int,), "drawn": (bool,), "generators": (dict,), "last": (str, type(None))}
_OF_OPTIONS = {"per_device_train_batch_size": (int,), "world_size": (int,)}
_ANEW = "load the model from the checkpoint and leave resume_from_checkpoint out"
OTHER_DATA = (
    "resume_from_checkpoint: the dataset gives other batches than it gave the run at the same place, so the steps from "
    "here on are not those of the run; a dataset, sampler or collator that keeps a state beside the generators of "
    "PyTorch, NumPy and Python in its attributes must derive it from set_epoch(epoch), or the data were changed"
)


def kept_by_state(optimizer: ZeroOrderOptimizer) -> dict[str, Any]:
    """The options that `load_state_dict` restores, under their names in the arguments."""
    groups = optimizer.param_groups
    of_groups = {
        "learning_rate": [group.get("initial_lr", group["lr"]) for group in groups],
        "eps": [group["eps"] for group in groups],
        "weight_decay": [group["weight_decay"] for group in groups],
        "sparsity": [group["sparsity"] for group in groups],
        "anchor_lr": [group.get("unscheduled_rates", (0, group.get("anchor_lr")))[1] for group in groups],
    }
    told = {name: values[0] if len(set(values)) == 1 else values for name, values in of_groups.items()}
    told |= {"zo_seed": optimizer.seed, "distribution": optimizer.distribution}
    told |= {"directions": optimizer.directions, "drop": optimizer.drop}
    told |= {"estimator": optimizer.estimator, "normalize": optimizer.normalize, "mask": optimizer.mask}
    return told | {name: getattr(optimizer, name, None) for name in ("anchor_every", "shared_direction", "anneal")}


def given(args: ZOTrainingArguments, optimizer: ZeroOrderOptimizer, objective: Any) -> dict[str, Any]:
    """The options that `load_state_dict` does not restore, fit for JSON."""
    told = {name: getattr(args, name) for name in _OF_ARGUMENTS if hasattr(args, name)}
    if args.max_steps > 0:
        told.pop("num_train_epochs", None)
    told |= {"perturb": optimizer.perturb, "rounding": optimizer.rounding, "parallel": args.parallel}
    told["objective"] = objective if isinstance(objective, str) else getattr(objective, "__qualname__", "a function")
    return json.loads(json.dumps(told, default=lambda value: getattr(value, "value", str(value))))


def check_unchanged(saved: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raise ValueError unless the run used the method and the distribution that are given now."""
    for name, value in now.items():
        if saved[name] != value:
            raise ValueError(
                f"{name}: expected {saved[name]!r}, with which the run to be resumed began, got {value!r}; {_ANEW}"
            )


def tell_of_changes(
    optimizer: ZeroOrderOptimizer,
    kept: Mapping[str, Any],
    taken: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
) -> None:
    """Warn of options that differ from those of the run.

    Args:
        optimizer: with the state of the run.
        kept: of `kept_by_state`, before it had that state.
        taken: of `given`, now.
        saved: of the checkpoint.
    """
    told = []
    of_run = {} if saved is None else saved["options"]
    for run, now, what in (
        (kept_by_state(optimizer), kept, "the run's are kept"),
        (of_run, taken, "those given now are taken from here on"),
    ):
        differ = [name for name in run if name in now and run[name] != now[name]]
        if differ:
            told.append(f"{what}: " + ", ".join(f"{name} {run[name]!r} (now {now[name]!r})" for name in differ))
    if told:
        optimizer._warner.note(  # a note only: training for longer is no mistake
            "resumed options",
            f"resume_from_checkpoint: the run had other options than were given now; {'; '.join(told)}. To train with "
            f"all that was given now, {_ANEW}",
        )
    if saved is None:
        optimizer._warner.warn(
            "resumed without a place",
            "resume_from_checkpoint: the checkpoint has no zo_trainer.json, as those of earlier versions: options that "
            "were changed may go unnoticed, and batches differ from the run's if the dataset or the collator draws "
            "random numbers, or if a stream was read more than once",
        )


@contextmanager
def without_being_told_twice(saved: Mapping[str, Any] | None) -> Iterator[None]:
    """Silence the warning of `resume` about options that `tell_of_changes` has already named."""
    with warnings.catch_warnings():
        if saved is not None:
            warnings.filterwarnings("ignore", message="resume: the run had ")
        yield


def seed_of_data(args: ZOTrainingArguments) -> int:
    """The seed of the numbers drawn while examples are read."""
    return args.seed if args.data_seed is None else args.data_seed


def place_in_data(saved: Mapping[str, Any] | None, args: ZOTrainingArguments) -> dict[str, Any] | None:
    """Where to begin to read, in batches of the current size. None if it is not known."""
    if saved is None or saved["data"] is None:
        return None
    place = dict(saved["data"])
    if args.ignore_data_skip:
        return {**place, "batches": 0, "last": None}
    options = saved["options"]
    before = options["per_device_train_batch_size"] * options["world_size"]
    if any(options.get(name) != getattr(args, name) for name in ("seed", "data_seed")):
        place["last"] = None  # other batches are what was asked for
    if (now := args.per_device_train_batch_size * args.world_size) != before:
        place |= {"batches": place["batches"] * before // now, "last": None}
    return place


def _path(checkpoint: str | Path, args: ZOTrainingArguments) -> Path:
    return Path(checkpoint) / ("zo_trainer.json" if args.world_size == 1 else f"zo_trainer_{args.process_index}.json")


def save(
    checkpoint: str | Path, args: ZOTrainingArguments, optimizer: ZeroOrderOptimizer, objective: Any, place: Any
) -> None:
    """Write method, distribution, options and the place in the data into a checkpoint; `saved` reads them."""
    told = {
        "version": 1,
        "method": args.method,
        "distribution": optimizer.distribution,
        "options": given(args, optimizer, objective),
        "data": place,
    }
    files.replace(_path(checkpoint, args), json.dumps(told).encode())


def saved(checkpoint: str | Path, args: ZOTrainingArguments) -> dict[str, Any] | None:
    """What `save` wrote into a checkpoint; None if it is an earlier version's, or one of another number of processes
    that this one was not among.

    Raises ValueError if the file is damaged, or a newer version's.
    """
    path = _path(checkpoint, args)
    if not path.is_file():
        path = next(iter(sorted(Path(checkpoint).glob("zo_trainer*.json"))), path)
        if not path.is_file():
            return None
    try:
        told = json.loads(path.read_bytes())
        version = told["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if type(version) is int and version > 1:
        raise ValueError(
            f"resume_from_checkpoint: expected {path} of version 1, got {version}: the checkpoint was made by a "
            "newer zo_kernels; update this one"
        )
    if version == 1:
        told = {"distribution": "normal", **told}  # earlier versions had no other, and named none
    wrong = "version" if version != 1 else _wrong(told, _FIELDS) or _wrong(told["options"], _OF_OPTIONS)
    if wrong or (told["data"] is not None and (wrong := _wrong(told["data"], _OF_DATA))):
        raise ValueError(f"resume_from_checkpoint: expected what ZOTrainer wrote to {path}, got another {wrong} in it")
    return told


def _wrong(told: Any, fields: Mapping[str, Any]) -> str | None:
    """The first field that is missing or of another type, else None."""
    values = told if isinstance(told, dict) else {}
    return next((name for name, kinds in fields.items() if type(values.get(name, ...)) not in kinds), None)
