"""The command line of `peers`."""

from __future__ import annotations

import argparse

from ..options import chosen


def add(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
