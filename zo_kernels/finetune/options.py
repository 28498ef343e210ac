"""The options of a run. Each is a field of `Config` and shows that field's default."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from zo_kernels.finetune import config as settings
from zo_kernels.finetune.tasks import TASKS

ALONE = f"--lr {settings.AUTO} finds one, for a run alone (zo-finetune --lr {settings.AUTO})"


def add_options(parser: argparse.ArgumentParser, several: Collection[str] = ()) -> None:
    """Add all options of a run, in groups. Those named in `several` take a comma-separated list of numbers."""
    defaults = {field.name: field.default for field in fields(settings.Config)}

    def add(group: argparse._ArgumentGroup, option: str, help: str, **kwargs: Any) -> None:
        name = option[2:].replace("-", "_")
        default = defaults[name]
        shown = "" if default is None or default is False else f" (default {default})"
        if name in several:
            kwargs |= {"type": numbers, "metavar": "X,X,..."}
            default = None
        elif kwargs.get("type") in (int, float):
            kwargs["metavar"] = "N" if kwargs["type"] is int else "X"
        group.add_argument(option, default=default, help=help + shown, **kwargs)

    model = parser.add_argument_group("model and run folder")
    add(model, "--model", "folder or hub id of the pretrained model: an encoder (default all-MiniLM-L6-v2) or, with "
        "--task, a causal or masked language model", metavar="PATH|ID")  # fmt: skip
    add(model, "--max-tokens", f"cut texts that are longer than N tokens (default {settings.CLASSIFIER_TOKENS}; with "
        "--task as many as the model can read, at most 2048)", type=int)  # fmt: skip
    add(model, "--freeze", "part of the model that is not trained", choices=settings.FROZEN)
    add(model, "--out", "folder for everything the run writes (default runs/METHOD-DATE-TIME)", metavar="DIR")
    add(model, "--overwrite", "if --out holds an earlier run, replace its files; other files in it stay, and a folder "
        "that holds no run is refused", action="store_true")  # fmt: skip

    classifier = parser.add_argument_group("to train a classifier")
    add(classifier, "--data", "training examples: a .tsv or .csv file with the columns label and text, or a .jsonl "
        "file with these keys (see docs/tasks.md, Tables)", metavar="FILE")  # fmt: skip
    add(classifier, "--test-data", "test examples, in the same form (default: a fifth of --data is held out)",
        metavar="FILE")  # fmt: skip
    add(classifier, "--head-start", "how to initialise the head: from the embeddings of the labels' names, from those "
        "of a few examples of each label (--shots), or at random", choices=settings.HEAD_STARTS)  # fmt: skip
    add(classifier, "--shots", "examples of each label for --head-start few-shot", type=int)

    data = parser.add_argument_group("to do either")
    add(data, "--test-examples", "number of held-out examples to test on, or all; with --task they come from the "
        "validation split. They are the same for every --seed (default 1000, or all if there are fewer)",
        type=_count_or_all, metavar="N|all")  # fmt: skip

    task = parser.add_argument_group("to learn a task with prompts (see docs/tasks.md)")
    add(task, "--task", "task to learn; its data set is loaded from the hub", choices=tuple(TASKS))
    add(task, "--task-data", "read the data set from this folder and not from the hub: files train and validation "
        "(.parquet, .json, .jsonl or .csv) with the columns of the data set on the hub", metavar="DIR")  # fmt: skip
    add(task, "--model-kind", "kind of language model; auto reads it from the model's configuration",
        choices=settings.MODEL_KINDS)  # fmt: skip
    add(task, "--loss", "cross-entropy over the candidate answers, or over the tokens of the right answer (default "
        "candidates; tokens for copa and squad)", choices=settings.LOSSES)  # fmt: skip
    add(task, "--objective", "what training minimises on each batch: the loss, 1 - accuracy, or 1 - F1",
        choices=settings.OBJECTIVES)  # fmt: skip
    add(task, "--train-examples", "number of training examples, from the training split (default 1000, or all that "
        "are left)", type=int)  # fmt: skip
    add(task, "--dev-examples", "number of development examples, from the training split (default 500, 100 for cb and "
        "copa; at most half of the split)", type=int)  # fmt: skip
    add(task, "--max-new-tokens", "longest answer to generate, in tokens", type=int)

    method = parser.add_argument_group("method")
    add(method, "--method", "zeroth-order method (see docs/methods.md)", choices=settings.METHODS)
    add(method, "--lr", "learning rate, or auto, which finds one by the first steps of the run at several rates "
        f"(default {_listed(settings.DEFAULT_LR)}; with --task {_listed(settings.TASK_LR)})", type=_rate,
        metavar="X|auto")  # fmt: skip
    add(method, "--schedule", "how the learning rate changes over the run", choices=settings.SCHEDULES)
    add(method, "--eps", "scale of the perturbation", type=float)
    add(method, "--perturb", "where to perturb: the weights in place, or copies of them in the forward; auto chooses "
        "in_place for fp32 and in_forward for 16-bit weights", choices=settings.PERTURB)  # fmt: skip
    add(method, "--rounding", "how updates of 16-bit weights are rounded; auto chooses stochastic",
        choices=settings.ROUNDINGS)  # fmt: skip
    add(method, "--distribution", "of the noise: normal, or rademacher, which is random signs and makes passes over "
        "the weights faster (default rademacher for fzoo, else normal)", choices=settings.DISTRIBUTIONS)  # fmt: skip
    add(method, "--weight-decay", "decoupled weight decay; biases and normalisation layers are not decayed",
        type=float)  # fmt: skip
    add(method, "--directions", "random directions averaged in each step; each costs two forwards, one-sided one "
        "(default 8 for fzoo, else 1)", type=int)  # fmt: skip
    add(method, "--estimator", "two_sided: losses on both sides of the weights, two forwards a direction; one_sided: "
        "on one side, and one forward at the weights (default one_sided for fzoo, else two_sided)",
        choices=settings.ESTIMATORS)  # fmt: skip
    add(method, "--normalize", "what the learning rate is divided by: nothing, the standard deviation of the projected "
        "gradients over the directions of a step, or their running root mean square (default std for fzoo, else none); "
        "rates are then in units of the weights", choices=settings.NORMALIZE)  # fmt: skip
    add(method, "--sparsity", "fraction of each tensor that is neither perturbed nor updated (default 0.75 for "
        "sparse-mezo, else 0)", type=float)  # fmt: skip
    add(method, "--mask", "with --sparsity: which weights take part is decided in each step, or once for the run",
        choices=settings.MASKS)  # fmt: skip
    add(method, "--drop", "fraction of transformer blocks that a step leaves unchanged (default 0.5 for lezo, else 0)",
        type=float)  # fmt: skip
    anchor = settings.DEFAULT_ANCHOR
    add(method, "--anchor-every", f"mezo-svrg: steps from one anchor to the next (default {anchor.every})", type=int)
    add(method, "--anchor-lr", "mezo-svrg: learning rate of the steps at an anchor (default twice --lr)", type=float)
    add(method, "--anchor-examples", "mezo-svrg: training examples that estimate the full loss at an anchor, in whole "
        f"batches (default {anchor.examples}; a smaller training set repeats examples)", type=int)  # fmt: skip
    add(method, "--anneal", "mezo-svrg: divide all learning rates by X whenever the loss at an anchor is more than "
        "--anneal-above times that at the anchor before (default: never)", type=float)  # fmt: skip
    add(method, "--anneal-above", "mezo-svrg: the ratio of losses for --anneal (default 1.05)", type=float)

    run = parser.add_argument_group("run")
    add(run, "--steps", "number of optimizer steps", type=int)
    add(run, "--batch-size", "examples in each step", type=int)
    add(run, "--eval-every", "steps between evaluations on the development examples", type=int)
    add(run, "--seed", "seed of the split, the batches and the noise", type=int)
    add(run, "--threads", "CPU threads for PyTorch and for the kernels", type=int)
    add(run, "--dtype", "dtype of the weights", choices=settings.DTYPES)
    add(run, "--device", "any device that PyTorch knows, such as cuda")
    add(run, "--backend", "kernels to use (default: chosen by the device)", metavar="NAME")


def _rate(text: str) -> float | str:
    try:
        return text if text == settings.AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or {settings.AUTO}, got {text!r}") from None


def _count_or_all(text: str) -> int | str:
    if text != settings.ALL and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, or {settings.ALL}, got {text!r}")
    return text if text == settings.ALL else int(text)


def numbers(text: str) -> tuple[float, ...]:
    """Parse a comma-separated list. Raises argparse.ArgumentTypeError for anything else, and for repeated numbers."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if settings.AUTO in text.split(","):
        raise argparse.ArgumentTypeError(f"expected numbers, got {text!r}: a sweep tries rates that are given; {ALONE}")
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different numbers, separated by commas, got {text!r}")
    return found


def add_resume(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--resume` and `--recover`. No other option may be given beside them."""
    parser.add_argument(
        "--resume", help=f"{help}; its settings are kept, so the only other option allowed is --recover", metavar="DIR"
    )
    parser.add_argument(
        "--recover",
        action="store_true",
        help="with --resume: if files are damaged, go on from the last sound record and keep a copy of the rest",
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the descriptions."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{rate} for {name}" for name, rate in rates.items())
