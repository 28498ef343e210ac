"""The command line of `randomness`."""

from __future__ import annotations

import argparse

from ..bench.options import chosen, count, positive

GENERATORS = ("zo.noise", "torch.randn", "tl.randn")


def values(text: str) -> int:
    """A number of values: 64M (64 * 2**20), or 1e10."""
    try:
        number = float(text)
    except ValueError:
        return count(text)
    if not (number >= 1 and number.is_integer()):
        raise argparse.ArgumentTypeError(f"expected a whole number of values, got {text!r}")
    return int(number)


def randomness(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument(
        "--values", type=values, default=2**30, metavar="N", help="of moments and correlations (default 1G)"
    )
    parser.add_argument(
        "--triton-values", type=values, default=2**26, metavar="N",
        help="of tl.randn in Triton's interpreter, which makes a million a second (default 64M)",
    )  # fmt: skip
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS), help="default all")
    parser.add_argument("--device", default="cpu", help="where values are made and counted (default %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="of PyTorch (default %(default)s)")
    parser.add_argument(
        "--battery", choices=("quick", "all"), default="quick",
        help="dieharder's tests: those that take minutes (default), or all, which take hours",
    )  # fmt: skip
