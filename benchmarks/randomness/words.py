"""Words of Philox as the battery reads them: in a run's order, and in the least random orders that a run could ask for.

In the latter, the counters of neighbouring words differ in a few low bits of one number, and all else is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor

from zo_kernels import spec

from .sources import TENSORS, ids

_BLOCK = 2**15  # counters made at once; they stay in a processor's cache
STREAMS = {"sign": spec.SIGN_STREAM, "rounding": spec.SIGN_ROUNDING_STREAM}


def of(counter: Tensor, param_id: Tensor, stream: Tensor, seed: Tensor) -> Tensor:
    """int64 (..., 4): the words of counters below 2^32, of ids and streams, under seeds below 2^32."""
    numbers, key = (counter, 0 * counter, param_id, stream), (seed, 0 * seed)
    return torch.stack(spec.philox4x32(numbers, key), dim=-1)  # type: ignore[arg-type]


def in_order() -> Iterator[Tensor]:
    """The words of normals: of a model's tensors, 2^14 of each, one after the other, step after step."""
    counter = torch.arange(2**12)
    zero = torch.zeros_like(counter)
    for step in count():
        seed = spec.direction_seed(0, step, 0)
        for param_id in ids():
            words = spec.philox4x32((counter, zero, zero + param_id, zero), (seed & 0xFFFFFFFF, seed >> 32))
            yield torch.stack(words, dim=1).flatten()


def interleaved() -> Iterator[Tensor]:
    """Words of normals of seeds and ids 0, 1, 2, ...: each beside the same word of the next seed, then id."""
    seeds, counters = 64, 16
    counter, param_id = torch.arange(counters)[:, None, None], torch.arange(TENSORS)[:, None]
    zero = torch.zeros(counters, TENSORS, seeds, dtype=torch.int64)
    for block in count():
        seed = torch.arange(block * seeds, (block + 1) * seeds)
        words = spec.philox4x32((counter + zero, zero, param_id + zero, zero), (seed, 0 * seed))
        yield torch.stack(words, dim=1).flatten()


def numbered(stream: int, what: str) -> Iterator[Tensor]:
    """The four words of a counter for each number 0, 1, 2, ...: of a "seed", of an "id", or of the "counter" itself."""
    for block in count():
        number = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)
        zero = torch.zeros_like(number)
        counter, param_id, seed = (number if name == what else zero for name in ("counter", "id", "seed"))
        yield of(counter, param_id, zero + stream, seed).flatten()


def elements() -> Iterator[Tensor]:
    """The signs of one seed and id in the order of their elements, the first of 32 in the lowest bit; 1 is -1."""
    for words in numbered(spec.SIGN_STREAM, "counter"):
        even, odd = words & 0xFFFF, words >> 16
        yield _spread(even) | _spread(odd) << 1


def _spread(halves: Tensor) -> Tensor:
    """16 bits -> the even bits of 32."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        halves = (halves | halves << shift) & mask
    return halves


def mingled() -> Iterator[Tensor]:
    """Word by word those of the three streams, of one counter after the other."""
    stream = torch.tensor([spec.NORMAL_STREAM, spec.SIGN_STREAM, spec.SIGN_ROUNDING_STREAM])[:, None]
    for block in count():
        counter = torch.arange(block * _BLOCK, (block + 1) * _BLOCK) + 0 * stream
        yield of(counter, 0 * counter, stream + 0 * counter, 0 * counter).permute(1, 2, 0).flatten()


ORDERS: dict[str, dict[str, Callable[[], Iterator[Tensor]]]] = {
    "zo.noise": {"words in order": in_order, "words interleaved": interleaved},
    "zo.noise signs": {
        **{
            f"{name} words by {what}": partial(numbered, stream, what)
            for name, stream in STREAMS.items()
            for what in ("seed", "id", "counter")
        },
        "signs by element": elements,
        "streams in turn": mingled,
    },
}
