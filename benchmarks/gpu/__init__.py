"""Everything a GPU is asked in the minutes that it is at hand: one command, and what becomes of what it brings back."""

from __future__ import annotations

import argparse

from ..bench.options import chosen, common, positive, regex

SECONDS = 480.0


def gpu_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FOLDER", help="where gpu.tgz goes, which holds all results")
    parser.add_argument("--seconds", type=positive, default=SECONDS, help="time for all stages (default 480)")
    parser.add_argument("--only", type=regex, metavar="REGEX", help="run only `machine` and the stages that match")
    parser.add_argument("--plan", action="store_true", help="show the stages and their time limits, and stop")
    parser.add_argument("--dry-run", action="store_true", help="run every stage on the CPU at toy sizes")
    parser.add_argument("--commit", metavar="ID", help="commit of this code, if git cannot tell it")
    parser.add_argument("--read", metavar="FILE", help="make a page of a gpu.tgz, and stop")
    parser.add_argument("--into", metavar="FOLDER", help="where the page's folder goes (default docs/gpu)")


def machine_options(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    common(parser, device={"default": "cuda", "help": "default %(default)s"})


def bits_options(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    common(parser, "threads", device={"default": "cuda", "help": "device of triton and cuda (default %(default)s)"})
    common(parser, elements={"default": 2**28, "help": "elements of the longest tensor (default 256M)"})
