"""The command line of `peers`."""

from __future__ import annotations

import argparse

from ..bench.options import Distinct, folder, positive, seed, timed

SHAPES = ("tiny", "minilm", "opt-125m")
# Of adapters that run a checkout: the option that points to it.
CHECKOUTS = {
    "mezo": "princeton-nlp/MeZO",
    "zo2": "liangyuwang/zo2",
    "zo_llm": "ZO-Bench/ZO-LLM",
    "mezo_svrg": "amazon-science/mezo_svrg",
}


def peers(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=3, seconds=0.0)
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=["opt-125m", "minilm"], help="default opt-125m minilm"
    )
    parser.add_argument("--batch", type=positive, help="examples; opt-125m's are 1, others their own, if not given")
    parser.add_argument("--tokens", type=positive, help="of each example; opt-125m's are 32, others their own")
    parser.add_argument("--threads", type=positive, default=2, help="default %(default)s")
    parser.add_argument(
        "--steps", type=positive, default=20, help="of each run whose loss is compared (default %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=seed, nargs="+", action=Distinct, default=[1, 2, 3], help="of those runs (default 1 2 3)"
    )
    parser.add_argument("--lr", type=float, default=1e-5, help="of all steps (default %(default)s)")
    for name, repository in CHECKOUTS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=folder(), metavar="PATH", help=f"a checkout of {repository}"
        )
