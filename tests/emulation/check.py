"""The AVX-512 kernels, emulated, against the reference: `python check.py FOLDER_OF_THE_BUILT_MODULE` (see Makefile)."""

from __future__ import annotations

import importlib.util
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from matrix import DISTRIBUTIONS, DTYPES, HIGH, ROUNDINGS, a_pass, assert_same_bits, table, to, weights

from zo_kernels.backends import native, reference
from zo_kernels.backends.types import Entry, MaskKind


def main(folder: str) -> None:
    """Run the matrix and a tensor of several chunks; an assertion names the first difference."""
    [path] = Path(folder).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("_native", path)
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    native._native = emulated
    native.instruction_sets = lambda: ["avx512"]
    backend, cpu, count = native.Native("avx512"), torch.device("cpu"), 0
    for dtype in DTYPES:
        for kind in MaskKind:
            for rounding in ROUNDINGS:
                for distribution, (directions, in_place) in product(DISTRIBUTIONS, ((1, True), (3, False))):
                    entries = table(dtype, kind, in_place=in_place)
                    long = weights(2**15 + 300, dtype, 5)
                    bits = torch.zeros((long.numel() + 7) // 8, dtype=torch.uint8)
                    mask = long > 0 if kind is MaskKind.BOOL else bits
                    entries.append(Entry(long, long, 77, HIGH[distribution][-1] - 2**14, 0, kind, 1e-3, mask))
                    want, got = to(entries, cpu), to(entries, cpu)
                    do = a_pass(directions, rounding, decay=0.9, distribution=distribution)
                    reference.prepare(want)(do)
                    backend.prepare(got)(do)
                    assert_same_bits(got, want)
                    count += len(entries)
    print(f"{count} tensors, equal bits")


if __name__ == "__main__":
    main(sys.argv[1])
