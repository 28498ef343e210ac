"""The same steps by other packages."""

from __future__ import annotations

import argparse

from ..bench.options import Distinct, common, folder, positive, seed, timed

# Peers that run from a checkout, which the option of their name points to.
CHECKOUTS = {
    "mezo": "princeton-nlp/MeZO",
    "zo2": "liangyuwang/zo2",
    "zo-llm": "ZO-Bench/ZO-LLM",
    "mezo-svrg": "amazon-science/mezo_svrg",
}


def peers_options(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=3, seconds=0.0)
    shapes = {"nargs": "+", "choices": ("tiny", "minilm", "opt-125m"), "default": ["opt-125m", "minilm"]}
    small = "(default: the shape's own, opt-125m's {})"
    common(
        parser,
        "threads",
        shape=shapes | {"help": "shapes of the model (default opt-125m minilm)"},
        batch={"help": f"examples in a batch {small.format(1)}"},
        tokens={"help": f"tokens in each example {small.format(32)}"},
    )
    parser.add_argument(
        "--steps", type=positive, default=20, help="steps of each run whose loss is compared (default %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=seed, nargs="+", action=Distinct, default=[1, 2, 3], help="seeds of those runs (default 1 2 3)"
    )
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate (default %(default)s)")
    for name, repository in CHECKOUTS.items():
        parser.add_argument(f"--{name}", type=folder(), metavar="PATH", help=f"a checkout of {repository}")
