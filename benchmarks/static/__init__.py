"""Machine code of GPUs that need not be here, counted."""

from __future__ import annotations

import argparse

from zo_kernels.spec import DISTRIBUTIONS

from ..bench.options import chosen


def static_options(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90], choices=(80, 90), help="compute capabilities (default 80 90)"
    )
    parser.add_argument(
        "--distribution", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), help="of z (default both)"
    )
