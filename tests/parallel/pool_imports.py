"""What the ranks of a pool import, once for all of them."""

import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import zo_kernels  # noqa: F401
