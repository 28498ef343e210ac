"""The 32-bit words that noise v1 is made from, many (seed, id) at a time, in orders that a run could ask for.

The library keeps its words in registers, so they are made here again; `wrong` holds them to the specification's, and
the normals that the specification makes of them to the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

import zo_kernels as zo
from zo_kernels import spec

from .sources import TENSORS, ids

_U64 = NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_COUNTERS_IN_ORDER = 2**12  # of a tensor: 2**14 elements
_SEEDS, _IDS, _COUNTERS = 64, 16, 16  # interleaved


def philox(counter: _U64, param_id: _U64, seed: _U64) -> list[_U64]:
    """The four words of each counter; the arguments are broadcast together."""
    shape = np.broadcast_shapes(counter.shape, param_id.shape, seed.shape)
    c0, c1, c2 = (np.broadcast_to(c, shape) for c in (counter & _LOW, counter >> _HALF, param_id))
    c3 = np.zeros(shape, dtype=np.uint64)
    k0, k1 = seed & _LOW, seed >> _HALF
    m0, m1 = np.uint64(spec.PHILOX_M0), np.uint64(spec.PHILOX_M1)
    w0, w1 = np.uint64(spec.PHILOX_W0), np.uint64(spec.PHILOX_W1)
    for _ in range(spec.PHILOX_ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + w0) & _LOW, (k1 + w1) & _LOW
    return [c0, c1, c2, c3]


def in_order() -> Iterator[NDArray[np.uint32]]:
    """The tensors of a model one after the other, step after step: seeds mixed and ids hashed as in a run."""
    counter = np.arange(_COUNTERS_IN_ORDER, dtype=np.uint64)
    for tensor in count():
        step, number = divmod(tensor, TENSORS)
        seed = np.uint64(spec.direction_seed(0, step, 0))
        words = philox(counter, np.array([ids()[number]], dtype=np.uint64), np.array([seed]))
        yield np.stack(words, axis=1).astype(np.uint32).ravel()


def interleaved() -> Iterator[NDArray[np.uint32]]:
    """Seeds 0, 1, 2, ... and ids 0, 1, 2, ...: each word beside the same word of the next seed, then of the next id."""
    counter = np.arange(_COUNTERS, dtype=np.uint64)[:, None, None]
    param_id = np.arange(_IDS, dtype=np.uint64)[None, :, None]
    for block in count():
        seed = np.arange(block * _SEEDS, (block + 1) * _SEEDS, dtype=np.uint64)[None, None, :]
        yield np.stack(philox(counter, param_id, seed), axis=1).astype(np.uint32).ravel()


ORDERS: dict[str, Callable[[], Iterator[NDArray[np.uint32]]]] = {"in order": in_order, "interleaved": interleaved}


def wrong() -> str | None:
    """What differs between a few blocks of both orders, the specification and the library, or None."""
    first = {name: next(order()) for name, order in ORDERS.items()}
    interleaved_words = first["interleaved"].reshape(_COUNTERS, 4, _IDS, _SEEDS)
    samples = [
        (spec.direction_seed(0, 0, 0), ids()[0], first["in order"]),
        *((s, i, interleaved_words[:, :, i, s].ravel()) for s, i in ((0, 0), (1, _IDS - 1), (_SEEDS - 1, 1))),
    ]
    for seed, param_id, found in samples:
        index = torch.arange(len(found))
        radius, angle = spec.words(index, seed, param_id)
        if not np.array_equal(torch.where(index % 2 == 0, radius, angle).numpy(), found):
            return f"the words of seed {seed}, id {param_id} are not those of the specification"
        pairs = torch.from_numpy(found.astype(np.int64)).view(-1, 2)
        normals = torch.stack(spec.box_muller(pairs[:, 0], pairs[:, 1]), dim=1).flatten()
        made = zo.noise(len(found), seed=seed, param_id=param_id)
        if not torch.equal(normals.view(torch.int32), made.view(torch.int32)):
            return f"the library's values of seed {seed}, id {param_id} are not made of these words"
    return None
