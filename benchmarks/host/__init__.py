"""What a step costs the host beside its forwards."""

from __future__ import annotations

import argparse

from ..bench.options import common, positive, timed


def host_options(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=20, seconds=5.0)
    common(parser, "device")
    parser.add_argument("--layers", type=positive, default=24, help="layers of the model (default %(default)s)")
