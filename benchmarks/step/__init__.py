"""Whole steps of the optimizers."""

from __future__ import annotations

import argparse

from ..bench.options import DISTRIBUTIONS, common, positive, several, timed


def step_options(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=5, seconds=20.0)
    common(parser, "batch", "tokens", "threads", "device", "backend")
    common(parser, shape={"nargs": "+", "help": "shapes of the model (default opt-1.3b on a GPU, minilm on a CPU)"})
    common(parser, dtype={"help": "default: bf16 for large shapes on a GPU, else fp32"})
    parser.add_argument(
        "--anchor-every", type=positive, default=2, help="steps between MeZO-SVRG's anchors (default %(default)s)"
    )
    parser.add_argument("--directions", type=several, default=8, help="of a step of FZOO (default %(default)s)")
    distributions = {"nargs": "+", "choices": DISTRIBUTIONS, "default": list(DISTRIBUTIONS)}
    parser.add_argument("--distribution", **distributions, help="of the directions (default both)")
    parser.add_argument("--graphed", action="store_true", help="on a GPU, compare with steps as CUDA graphs too")
