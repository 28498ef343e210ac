"""What the suites' command lines have in common. PyTorch is not imported here: it is not needed to print the help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

SHAPES = ("tiny", "opt-tiny", "minilm", "opt-125m", "opt-1.3b", "opt-13b", "llama-7b")
DTYPES = ("fp32", "bf16", "fp16")
_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def count(text: str) -> int:
    """4096, 64M (64 * 2**20), ..."""
    if not (match := re.fullmatch(r"(\d+)([KMG]?)", text)) or not int(match[1]):
        raise argparse.ArgumentTypeError(f"expected a positive number such as 4096, 512K or 64M, got {text!r}")
    return int(match[1]) * _SUFFIXES[match[2]]


def positive(text: str) -> int:
    """1, 2, ..."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """0, 1, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer from 0 on, got {text!r}")
    return int(text)


class Distinct(argparse.Action):
    """Several values, each once: one that is repeated would count twice."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # type: ignore[no-untyped-def]
        if len(set(values)) < len(values):
            raise argparse.ArgumentError(self, f"expected each value once, got {' '.join(map(str, values))}")
        setattr(namespace, self.dest, values)


def folder(*files: str) -> Callable[[str], str]:
    """A folder that is there, with these files."""

    def check(text: str) -> str:
        for path in (Path(text), *(Path(text, file) for file in files)):
            if not path.exists():
                raise argparse.ArgumentTypeError(f"there is no {path}")
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"expected a folder, got the file {text}")
        return text

    return check


def regex(text: str) -> str:
    """What `re` compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error
    return text


def chosen(parser: argparse.ArgumentParser) -> None:
    """Options of every suite."""
    parser.add_argument("--only", type=regex, metavar="REGEX", help="only cases in whose name it is found")
    parser.add_argument("--list", action="store_true", help="name the cases, say which are skipped and why, and stop")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, and as CSV beside it")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no case after that; the rest are skipped")


def timed(parser: argparse.ArgumentParser, *, rounds: int, seconds: float) -> None:
    """Options of suites whose calls are timed in pairs."""
    chosen(parser)
    parser.add_argument("--rounds", type=positive, default=rounds, help="pairs at the least (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="go on until so many have gone by (default %(default)s)"
    )
