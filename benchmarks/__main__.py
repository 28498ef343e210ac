"""python -m benchmarks SUITE: what is measured stands beside a check of the same call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .bench.options import DTYPES, SHAPES, Distinct, chosen, count, positive, regex, seed, timed
from .claims.options import add as _claims
from .gpu.options import add as _gpu
from .gpu.options import add_bits as _bits
from .gpu.options import add_machine as _machine
from .peers.options import add as _peers
from .randomness.options import add as _randomness


def _kernels(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=7, seconds=8.0)
    parser.add_argument(
        "--elements", type=count, nargs="+", default=[64 * 2**20], metavar="N", help="of the tensor (default 64M)"
    )
    parser.add_argument("--compile", action="store_true", help="against torch.compile on a CPU too (slow to build)")


def _step(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=5, seconds=20.0)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default opt-1.3b on a GPU, minilm on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 for the large shapes on a GPU, else fp32")
    parser.add_argument("--batch", type=positive, help="examples; the shape's own, if not given")
    parser.add_argument("--tokens", type=positive, help="of each example; the shape's own, if not given")
    parser.add_argument("--threads", type=positive, default=2, help="on a CPU (default %(default)s)")
    parser.add_argument(
        "--anchor-every", type=positive, default=2, help="steps of MeZO-SVRG to an anchor (default %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--backend", help="of zo_kernels; the device's default, if not given")
    parser.add_argument(
        "--graphed", action="store_true", help="on a GPU, against steps as CUDA graphs too, where there are such"
    )


def _static(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90], choices=(80, 90), help="compute capabilities (default 80 90)"
    )


def _profile(parser: argparse.ArgumentParser) -> None:
    chosen(parser)
    parser.add_argument("--out", metavar="FOLDER", default="runs/profile", help="default %(default)s")
    parser.add_argument(
        "--kinds", type=regex, default="", metavar="REGEX", help="only passes in whose label it is found"
    )
    parser.add_argument("--elements", type=count, default=2**24, metavar="N", help="of the tensor (default 16M)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm", help="of the step's model (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default %(default)s")
    parser.add_argument("--threads", type=positive, default=2, help="on a CPU (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--backend", help="of zo_kernels; the device's default, if not given")


def _offload(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=5, seconds=20.0)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default opt-1.3b opt-13b on a GPU, else minilm")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default %(default)s")
    parser.add_argument("--batch", type=positive, help="examples; the shape's own, if not given")
    parser.add_argument("--tokens", type=positive, help="of each example; the shape's own, if not given")
    parser.add_argument("--threads", type=positive, default=2, help="on a CPU (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")


def _host(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=20, seconds=5.0)
    parser.add_argument("--layers", type=positive, default=24, help="of the model (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")


def _plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="rows that the suites have written with --json")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the figures go")


def _evidence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("documents", nargs="+", metavar="DOCUMENT", help="Markdown with marks where tables belong")
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the tables are up to date")


def _exactness(parser: argparse.ArgumentParser) -> None:
    timed(parser, rounds=7, seconds=20.0)
    parser.add_argument(
        "--steps", type=positive, default=10_000, help="of drift and of the replayed run (default %(default)s)"
    )
    parser.add_argument("--draws", type=positive, default=256, help="of survival (default %(default)s)")
    parser.add_argument("--run-steps", type=positive, default=250, help="of each run of four (default %(default)s)")
    parser.add_argument(
        "--seeds", type=seed, nargs="+", action=Distinct, default=[0, 1, 2], help="of the runs of four (default 0 1 2)"
    )
    parser.add_argument("--lr", type=float, help="of the runs of four; the demo's, if not given")
    parser.add_argument("--threads", type=positive, default=2, help="default %(default)s")
    parser.add_argument("--model", metavar="FOLDER", help="an encoder; the demo's, if not given")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = top.add_subparsers(dest="suite", required=True)
    _kernels(suites.add_parser("kernels", help="one pass over a tensor: elements and bytes a second"))
    _step(suites.add_parser("step", help="a whole step of an optimizer on a model: forwards, passes, the rest"))
    _static(suites.add_parser("static", help="machine code of GPUs that need not be here, and what it predicts"))
    _profile(suites.add_parser("profile", help="a Chrome trace and tables of the kernels and of a step"))
    _exactness(suites.add_parser("exactness", help="drift, small updates, runs in 16 bits, replay"))
    _offload(suites.add_parser("offload", help="steps of weights that are copied to where their module runs"))
    _host(suites.add_parser("host", help="microseconds of the host's that a step takes beside its forwards"))
    _claims(suites.add_parser("claims", help="what the methods' papers claim, measured again"))
    _peers(suites.add_parser("peers", help="the same steps by other packages: time, memory, loss, exactness"))
    _randomness(suites.add_parser("randomness", help="statistics of the noise beside torch.randn's and tl.randn's"))
    _plot(suites.add_parser("plot", help="figures of rows that were written before"))
    _evidence(suites.add_parser("evidence", help="tables of rows that were written before, into documents"))
    _machine(suites.add_parser("machine", help="the GPU, the processor, and versions, as a row"))
    _bits(suites.add_parser("bits", help="noise and passes of AVX-512 and of GPUs against the CPU's, bit for bit"))
    _gpu(suites.add_parser("gpu", help="all that a GPU is asked in the minutes that it is at hand, and a page of it"))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    # PyTorch is not needed to print the help.
    if options.suite == "plot":
        from .bench import plot

        return plot.run(options.files, options.out)
    if options.suite == "evidence":
        from .bench import document

        return document.run(options.documents, options.check)
    if options.suite == "gpu":
        from .gpu import run

        return run.run(options)
    from .bench import runner

    try:
        return runner.run(options.suite, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
