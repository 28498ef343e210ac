"""PyTorch's inference mode, entered only where it is another one.

Its guard is an object of C++ that puts back the thread's whole state when it goes. Should an exception from outside
come just as it is entered or left, that is too late, so it is best not there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def inference_mode(mode: bool) -> AbstractContextManager[object]:
    """A context in which new tensors are inference tensors, or are not."""
    return nullcontext() if torch.is_inference_mode_enabled() == mode else torch.inference_mode(mode)
