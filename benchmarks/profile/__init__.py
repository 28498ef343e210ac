"""Traces and tables of a step and of the passes."""

from __future__ import annotations

import argparse

from ..bench.options import chosen, common, regex


def profile_options(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument("--out", metavar="FOLDER", default="runs/profile", help="where the traces go (%(default)s)")
    parser.add_argument(
        "--kinds", type=regex, default="", metavar="REGEX", help="profile only the passes whose label matches"
    )
    common(parser, "threads", "device", "backend", shape={"default": "minilm"}, dtype={"default": "fp32"})
    common(parser, elements={"default": 2**24, "help": "elements of the tensor (default 16M)"})
