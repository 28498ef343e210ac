"""Options of `gpu`, and of the two suites that it alone needs."""

from __future__ import annotations

import argparse

from ..bench.options import chosen, count, positive, regex

SECONDS = 480.0


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FOLDER", help="where gpu.tgz goes, all that was found")
    parser.add_argument(
        "--seconds", type=positive, default=SECONDS, help="for everything; what no longer fits is left (default 480)"
    )
    parser.add_argument("--only", type=regex, metavar="REGEX", help="machine, and stages in whose name it is found")
    parser.add_argument("--plan", action="store_true", help="show the stages and what they may take, and stop")
    parser.add_argument("--dry-run", action="store_true", help="every stage on the CPU, at toy sizes")
    parser.add_argument("--commit", metavar="ID", help="of this code, where git is not there to tell it")
    parser.add_argument("--read", metavar="FILE", help="make a page of the gpu.tgz that came back, and stop")
    parser.add_argument("--into", metavar="FOLDER", help="of the page's own folder (default docs/gpu)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default %(default)s")


def add_bits(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="of triton and cuda (default cuda)")
    parser.add_argument("--elements", type=count, default=2**28, metavar="N", help="of the longest (default 256M)")
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU's side (default %(default)s)")
