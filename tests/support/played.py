"""A stand-in for CUDA graphs on a CPU: a graph is played by calling its body again.

While the body runs, a stream is said to be captured, so that whoever asks takes the path that they take then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scripted import snapshot
from torch import Tensor, nn


class Graphs:
    """What takes the place of `graphed.captured`.

    Attributes:
        model: whose weights a capture leaves as they were, since nothing happens then.
        captures: how many there were.
    """

    def __init__(self, model: nn.Module):
        self.model, self.captures = model, 0

    def captured(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        before = snapshot(self.model)
        with capturing():
            result = body()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if not torch.equal(p, before[name]):  # or it would look like a change by somebody else
                    p.copy_(before[name])

        def replay() -> None:
            with capturing():
                again = body()
            for old, new in zip(tensors_of(result), tensors_of(again), strict=True):
                old.copy_(new)

        return replay, result


@contextmanager
def capturing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def tensors_of(result: Any) -> list[Tensor]:
    """That a replay writes anew, of a step or of a closure's loss."""
    if isinstance(result, Tensor):
        return [result]
    loss, numbers, pairs = result
    sums = [numbers.normalizer.square, numbers.normalizer.weight] if numbers.normalizer.kind == "rms" else []
    return [loss, numbers.losses, *numbers.gradients[0], *sums, *(value for pair in pairs for value in pair)]
