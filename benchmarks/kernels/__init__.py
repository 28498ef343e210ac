"""One pass over one tensor."""

from __future__ import annotations

import argparse

from ..bench.options import DISTRIBUTIONS, common, timed


def kernels_options(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=7, seconds=8.0)
    common(parser, elements={"nargs": "+", "default": [64 * 2**20], "help": "elements of the tensors (default 64M)"})
    parser.add_argument(
        "--distribution", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), help="of z (default both)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compare with torch.compile on a CPU too (slow to compile)"
    )
