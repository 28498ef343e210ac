"""The command line of `claims`."""

from __future__ import annotations

import argparse

from ..bench.options import Distinct, chosen, folder, positive, seed


def claims(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument(
        "--seeds",
        type=seed,
        nargs="+",
        action=Distinct,
        default=[0, 1, 2, 3, 4],
        help="of the runs that count (default 0 1 2 3 4)",
    )
    parser.add_argument(
        "--tuning-seeds",
        type=positive,
        default=2,
        help="how many other runs choose a learning rate (default %(default)s)",
    )
    parser.add_argument("--steps", type=positive, help="of each run; each claim's own, if not given")
    parser.add_argument("--fast", action="store_true", help="a few steps of the smallest models: to try the command")
    parser.add_argument(
        "--trec",
        type=folder("train.tsv", "test.tsv"),
        metavar="FOLDER",
        help="classify questions, too: a folder with train.tsv and test.tsv, with columns label and text",
    )
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        default="runs/claims",
        help="where pretrained models are kept (default %(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--threads", type=positive, default=2, help="on a CPU (default %(default)s)")
    parser.add_argument("--backend", help="of zo_kernels; the device's default, if not given")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="pairs of timed steps at the least (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each timing at the least (default %(default)s)")
