"""Measures zo_kernels. Every figure stands beside a check of the call that it is about."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .bench.registry import SUITES

_HELP = {
    "kernels": "time one pass over a tensor: elements and bytes a second",
    "step": "time a whole step of an optimizer: its forwards, its passes and the rest",
    "static": "count the machine code of GPUs that need not be here, and predict from it",
    "profile": "save a trace and tables of a step and of the kernels",
    "exactness": "measure drift, small updates, runs in 16 bits and replay",
    "offload": "time steps whose weights are copied to the device that uses them",
    "host": "time what a step costs the host beside its forwards",
    "claims": "measure again what the methods' papers claim",
    "peers": "run the same steps by other packages: time, memory, loss, exactness",
    "randomness": "test the noise, torch.randn's and tl.randn's",
    "machine": "describe the GPU, the processor and the versions",
    "bits": "compare AVX-512's and the GPUs' results with the CPU's, bit for bit",
    "gpu": "run everything that needs a GPU within eight minutes, or make a page of the results",
    "plot": "draw figures of rows written with --json",
    "evidence": "write tables of committed rows into documents",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="suite", required=True)
    for name, text in _HELP.items():
        folder = "bench.options" if name in ("plot", "evidence") else SUITES.get(name, name).partition(".")[0]
        add = getattr(importlib.import_module(f"benchmarks.{folder}"), f"{name}_options")
        add(commands.add_parser(name, help=text, description=text))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    # PyTorch is imported with these, not to print the help.
    if options.suite == "plot":
        from .bench import plot

        return plot.run(options.files, options.out)
    if options.suite == "evidence":
        from .bench import document

        return document.run(options.documents, options.check)
    if options.suite == "gpu":
        from .gpu import run

        return run.run(options)
    from .bench import runner

    try:
        return runner.run(options.suite, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
