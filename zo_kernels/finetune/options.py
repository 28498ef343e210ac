"""The options of a run: each is a field of `Config`, whose default it shows."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from zo_kernels.finetune import config as settings
from zo_kernels.finetune.tasks import TASKS


def add_options(parser: argparse.ArgumentParser, several: Collection[str] = ()) -> None:
    """Add all of them in groups; those named in `several` take a comma-separated list of numbers."""
    defaults = {field.name: field.default for field in fields(settings.Config)}

    def add(group: argparse._ArgumentGroup, option: str, help: str, **kwargs: Any) -> None:
        name = option[2:].replace("-", "_")
        default = defaults[name]
        shown = "" if default is None or default is False else f" (default {default})"
        if name in several:
            kwargs |= {"type": numbers, "metavar": "X,X,..."}
            default = None
        group.add_argument(option, default=default, help=help + shown, **kwargs)

    model = parser.add_argument_group("model and run folder")
    add(model, "--model", "folder or hub id of an encoder; by default all-MiniLM-L6-v2; with --task, of a causal or "
        "masked language model", metavar="PATH|ID")  # fmt: skip
    add(model, "--max-tokens", f"longer texts are cut (default {settings.CLASSIFIER_TOKENS}; with --task what the "
        "model can read, at most 2048)", type=int)  # fmt: skip
    add(model, "--freeze", "what is not trained", choices=settings.FROZEN)
    add(model, "--out", "run folder; by default runs/METHOD-DATE-TIME", metavar="DIR")
    add(model, "--overwrite", "replace the files of an earlier run in --out; other files stay, and a folder that "
        "is not a run's is refused", action="store_true")  # fmt: skip

    classifier = parser.add_argument_group("to train a classifier")
    add(classifier, "--data", "training examples: a .tsv or .csv with a header label,text, or a .jsonl with these keys "
        "(docs/tasks.md, Tables)", metavar="FILE")  # fmt: skip
    add(classifier, "--test-data", "test examples; by default a fifth of --data is held out", metavar="FILE")
    add(classifier, "--head-start", "the head before training: from the embeddings of the labels' names, of --shots "
        "examples a label, or at random", choices=settings.HEAD_STARTS)  # fmt: skip
    add(classifier, "--shots", "examples a label of a few-shot start", type=int)

    data = parser.add_argument_group("to do either")
    add(data, "--test-examples", "held-out examples that are evaluated, from the validation split if there is a task, "
        "the same for every --seed; or all (default 1000, or all if there are fewer)",
        type=_count_or_all, metavar="N|all")  # fmt: skip

    task = parser.add_argument_group("to learn a task with prompts (docs/tasks.md)")
    add(task, "--task", "which one; its data set is loaded from the hub", choices=tuple(TASKS))
    add(task, "--task-data", "folder with train and validation (.parquet, .json, .jsonl or .csv) instead of the hub, "
        "with the same columns", metavar="DIR")  # fmt: skip
    add(task, "--model-kind", "auto: by the model's configuration", choices=settings.MODEL_KINDS)
    add(task, "--loss", "cross-entropy over the candidates, or of the answer's tokens; by default candidates, and "
        "tokens for copa and squad", choices=settings.LOSSES)  # fmt: skip
    add(task, "--objective", "what training makes smaller: the loss, 1 - accuracy or 1 - F1 of each batch",
        choices=settings.OBJECTIVES)  # fmt: skip
    add(task, "--train-examples", "from the training split (default 1000, or all that are left)", type=int)
    add(task, "--dev-examples", "from the training split (default 500, 100 for cb and copa; at most half of it)",
        type=int)  # fmt: skip
    add(task, "--max-new-tokens", "of a generated answer", type=int)

    method = parser.add_argument_group("method")
    add(method, "--method", "see the README", choices=settings.METHODS)
    add(method, "--lr", f"learning rate (default {_listed(settings.DEFAULT_LR)}; with --task "
        f"{_listed(settings.TASK_LR)})", type=float)  # fmt: skip
    add(method, "--schedule", "of the learning rates", choices=settings.SCHEDULES)
    add(method, "--eps", "scale of the perturbation", type=float)
    add(method, "--perturb", "where: the weights in place, or copies of them in the forward; auto: in place for fp32, "
        "in the forward for 16 bits", choices=settings.PERTURB)  # fmt: skip
    add(method, "--rounding", "of 16-bit weights; auto: stochastic", choices=settings.ROUNDINGS)
    add(method, "--weight-decay", "decoupled; not on biases and normalisation", type=float)
    add(method, "--directions", "a step", type=int)
    add(method, "--sparsity", "fraction of each tensor left alone (default 0.75 for sparse-mezo, else 0)", type=float)
    add(method, "--drop", "fraction of transformer blocks left alone (default 0.5 for lezo, else 0)", type=float)
    anchor = settings.DEFAULT_ANCHOR
    add(method, "--anchor-every", f"mezo-svrg: steps from one anchor to the next (default {anchor.every})", type=int)
    add(method, "--anchor-lr", "mezo-svrg: of the steps at an anchor (default twice --lr)", type=float)
    add(method, "--anchor-examples", "mezo-svrg: training examples that stand for all at an anchor, in "
        f"whole batches (default {anchor.examples}; where there are fewer, some stand for two)", type=int)  # fmt: skip

    run = parser.add_argument_group("run")
    add(run, "--steps", "of the optimizer", type=int)
    add(run, "--batch-size", "examples a step", type=int)
    add(run, "--eval-every", "steps between evaluations on the development examples", type=int)
    add(run, "--seed", "of the split, the batches and the noise", type=int)
    add(run, "--threads", "of PyTorch and of our passes", type=int)
    add(run, "--dtype", "of the weights", choices=settings.DTYPES)
    add(run, "--device", "any that PyTorch knows")
    add(run, "--backend", "of our passes; by default by the device", metavar="NAME")


def _count_or_all(text: str) -> int | str:
    if text != settings.ALL and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, or {settings.ALL}, got {text!r}")
    return text if text == settings.ALL else int(text)


def numbers(text: str) -> tuple[float, ...]:
    """Of a comma-separated list. Raises argparse.ArgumentTypeError if it is none, or one stands in it twice."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different numbers with commas between them, got {text!r}")
    return found


def add_resume(parser: argparse.ArgumentParser, help: str) -> None:
    """`--resume`, which stands alone but for `--recover`."""
    parser.add_argument("--resume", help=f"{help}; takes no other option but --recover", metavar="RUN")
    parser.add_argument(
        "--recover",
        action="store_true",
        help="with --resume: of files that are damaged keep what is sound, and the rest beside them, and go on",
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the descriptions are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{rate} for {name}" for name, rate in rates.items())
