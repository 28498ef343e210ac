"""Steps of weights that stay on a CPU."""

from __future__ import annotations

import argparse

from ..bench.options import common, timed


def offload_options(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=5, seconds=20.0)
    common(parser, "batch", "tokens", "threads", "device", dtype={"default": "bf16"})
    common(parser, shape={"nargs": "+", "help": "shapes of the model (default opt-1.3b opt-13b on a GPU, else minilm)"})
