"""Statistics of the noise."""

from __future__ import annotations

import argparse

from ..bench.options import chosen, common, count

GENERATORS = ("zo.noise", "zo.noise signs", "torch.randn", "tl.randn")


def values(text: str) -> int:
    """A number of values: 64M (64 * 2**20), or 1e10."""
    try:
        number = float(text)
    except ValueError:
        return count(text)
    if not (number >= 1 and number.is_integer()):
        raise argparse.ArgumentTypeError(f"expected a whole number of values, got {text!r}")
    return int(number)


def randomness_options(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    common(parser, threads={"default": 1})
    number = {"type": values, "metavar": "N"}
    parser.add_argument("--values", default=2**30, help="values for moments and correlations (default 1G)", **number)
    slow = "the same for tl.randn: Triton's interpreter makes a million a second (default 64M)"
    parser.add_argument("--triton-values", default=2**26, help=slow, **number)
    parser.add_argument(
        "--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS), help="what makes them (default all)"
    )
