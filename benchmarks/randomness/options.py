"""The command line of `randomness`."""

from __future__ import annotations

import argparse

from ..options import chosen


def add(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
