"""What perturbing and rounding cost in exactness, and trajectories in time and bytes."""

from __future__ import annotations

import argparse

from ..bench.options import Distinct, common, positive, seed, timed


def exactness_options(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=7, seconds=20.0)
    common(parser, "threads")
    parser.add_argument(
        "--steps", type=positive, default=10_000, help="steps of `drift` and of the run that is replayed (%(default)s)"
    )
    parser.add_argument("--draws", type=positive, default=256, help="updates drawn in `survival` (default %(default)s)")
    parser.add_argument("--run-steps", type=positive, default=250, help="steps of each run of `four` (%(default)s)")
    parser.add_argument(
        "--seeds", type=seed, nargs="+", action=Distinct, default=[0, 1, 2], help="seeds of `four` (default 0 1 2)"
    )
    parser.add_argument("--lr", type=float, help="learning rate of `four` (default: the demo's)")
    parser.add_argument("--model", metavar="FOLDER", help="an encoder (default: the demo's)")
