"""Triton's kernels run in its interpreter on machines without a GPU; it must be chosen before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
