"""Options that several suites share, and those of `plot` and `evidence`.

PyTorch is not imported here, so that the help is printed at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ("tiny", "opt-tiny", "minilm", "opt-125m", "opt-1.3b", "opt-13b", "llama-7b")
DTYPES = ("fp32", "bf16", "fp16")
DISTRIBUTIONS = ("normal", "rademacher")
_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def count(text: str) -> int:
    """4096, or 64M for 64 * 2**20."""
    if not (match := re.fullmatch(r"(\d+)([KMG]?)", text)) or not int(match[1]):
        raise argparse.ArgumentTypeError(f"expected a positive number such as 4096, 512K or 64M, got {text!r}")
    return int(match[1]) * _SUFFIXES[match[2]]


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def several(text: str) -> int:
    if positive(text) == 1:
        raise argparse.ArgumentTypeError("expected at least 2, got 1")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer from 0 on, got {text!r}")
    return int(text)


class Distinct(argparse.Action):
    """Several different values: a repeated seed would count twice."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # type: ignore[no-untyped-def]
        if len(set(values)) < len(values):
            raise argparse.ArgumentError(self, f"expected each value once, got {' '.join(map(str, values))}")
        setattr(namespace, self.dest, values)


def folder(*files: str) -> Callable[[str], str]:
    """An existing folder that contains these files."""

    def check(text: str) -> str:
        for path in (Path(text), *(Path(text, file) for file in files)):
            if not path.exists():
                raise argparse.ArgumentTypeError(f"there is no {path}")
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"expected a folder, got the file {text}")
        return text

    return check


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error
    return text


_COMMON: dict[str, dict[str, Any]] = {
    "backend": {"help": "backend of zo_kernels (default: the device's own)"},
    "batch": {"type": positive, "help": "examples in a batch (default: the shape's own)"},
    "device": {"choices": ("cpu", "cuda"), "help": "default: cuda if there is a GPU, else cpu"},
    "dtype": {"choices": DTYPES, "help": "dtype of the weights (default %(default)s)"},
    "elements": {"type": count, "metavar": "N", "help": "elements of the tensor (default %(default)s)"},
    "shape": {"choices": SHAPES, "help": "shape of the model (default %(default)s)"},
    "threads": {"type": positive, "default": 2, "help": "threads on a CPU (default %(default)s)"},
    "tokens": {"type": positive, "help": "tokens in each example (default: the shape's own)"},
}


def common(parser: argparse.ArgumentParser, *names: str, **changed: dict[str, Any]) -> None:
    """Add options that several suites have: those named, and those whose settings are changed."""
    for name in (*names, *changed):
        parser.add_argument(f"--{name}", **(_COMMON[name] | changed.get(name, {})))


def chosen(parser: argparse.ArgumentParser) -> None:
    """Add the options of every suite."""
    parser.add_argument("--only", type=regex, metavar="REGEX", help="run only the cases whose name matches")
    parser.add_argument("--list", action="store_true", help="list the cases and why some are skipped, and stop")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file, and as CSV beside it")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="skip the cases not begun by then")


def timed(parser: argparse.ArgumentParser, *, rounds: int, seconds: float) -> None:
    """Add the options of a suite that times calls in pairs."""
    chosen(parser)
    parser.add_argument("--rounds", type=positive, default=rounds, help="least number of pairs (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="least time for the pairs of a case (default %(default)s)"
    )


def plot_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="rows that suites wrote with --json, or their CSV")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the figures go")


def evidence_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("documents", nargs="+", metavar="DOCUMENT", help="Markdown with marks where tables belong")
    parser.add_argument("--check", action="store_true", help="only say whether the tables are up to date")
