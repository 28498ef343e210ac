"""What the methods' papers claim, measured again."""

from __future__ import annotations

import argparse

from ..bench.options import Distinct, common, folder, positive, seed, timed


def claims_options(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=5, seconds=20.0)
    seeds = {"type": seed, "nargs": "+", "action": Distinct, "default": [0, 1, 2, 3, 4]}
    parser.add_argument("--seeds", **seeds, help="seeds of the runs that count (default 0 1 2 3 4)")
    parser.add_argument("--steps", type=positive, help="steps of each run (default: each claim's own)")
    parser.add_argument("--fast", action="store_true", help="a few steps of the smallest models: to try the command")
    trec = {"type": folder("train.tsv", "test.tsv"), "metavar": "PATH"}
    parser.add_argument("--trec", **trec, help="a folder with TREC's train.tsv and test.tsv (columns label and text)")
    common(parser, "device", "threads", "backend")
