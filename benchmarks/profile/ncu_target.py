"""What ncu runs: a pass of each kind, after a check of it.

python -m benchmarks.profile.ncu_target ELEMENTS DTYPE BACKEND [KINDS]: KINDS is found in the labels of those that run.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

from ..kernels.cases import DTYPES, kinds
from ..kernels.kernel_call import KernelCall, weights


def main(elements: str, dtype: str, backend: str, only: str = "") -> int:
    device = torch.device("cpu" if backend.startswith("native") else "cuda")
    w = weights(int(elements), DTYPES[dtype], device)
    calls = [KernelCall(w, kind, backend) for kind in kinds(only).values()]
    for call in calls:
        if wrong := call.check():
            print(f"WRONG {wrong}")
            return 1
    with torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
        for call in calls:
            call.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
