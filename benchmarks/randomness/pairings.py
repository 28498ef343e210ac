"""Which values of a generator should have nothing to do with which others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

import zo_kernels as zo
from zo_kernels.spec import mix

from .sources import Source

LAGS = (*range(1, 9), 16, 64, 1024)
_SEED_BITS, _ID_BITS = range(64), range(32)
_INDEX_BITS = range(20, 62)  # above those of an element in a tensor of a pairing
_ID = 0x9E3779B9

_Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pairing:
    """Pairs of values.

    Args:
        group: what is reported together.
        label: which of the group.
        draw: the pairs of one round, two float32 tensors of a shape; rounds share no value.
    """

    group: str
    label: str
    draw: Callable[[int], _Pair]


def of_source(source: Source, count: int) -> Iterator[Pairing]:
    """Those that every generator has: within the first tensor of a step, and with that of the next step."""

    def lagged(lag: int, round: int) -> _Pair:
        x = source.tensor(round, 0, count)
        return x[:-lag], x[lag:]

    def members(round: int) -> _Pair:
        pair = source.members(source.tensor(round, 0, count))
        assert pair is not None
        return pair

    def steps(round: int) -> _Pair:
        return source.tensor(2 * round, 0, count), source.tensor(2 * round + 1, 0, count)

    for lag in LAGS:
        yield Pairing("lags", f"lag {lag}", partial(lagged, lag))
    if source.members(source.tensor(0, 0, count)) is not None:
        yield Pairing("members of a Box-Muller pair", "", members)
    yield Pairing("next step", "", steps)


def of_noise(device: str, count: int) -> Iterator[Pairing]:
    """Those of noise v1 that is asked for with seeds, ids and indices that differ as little as they can."""

    def z(seed: int, param_id: int = _ID, offset: int = 0) -> Tensor:
        return zo.noise(count, seed=seed, param_id=param_id, offset=offset, device=device)

    def halves(round: int) -> _Pair:
        fours = z(round)[: count // 4 * 4].view(-1, 4)
        return fours[:, :2].flatten(), fours[:, 2:].flatten()

    def next_id(round: int) -> _Pair:
        return z(round), z(round, _ID + 1)

    def next_seed(round: int) -> _Pair:
        return z(2 * round), z(2 * round + 1)

    def neighbour(shift: int, round: int) -> _Pair:
        x, y = next_seed(round)
        return (x[:-shift], y[shift:]) if shift > 0 else (x[-shift:], y[:shift])

    def seed_bit(bit: int, round: int) -> _Pair:
        seed = mix(round)  # with 0, 1, 2, ... the other seed would be another round's
        return z(seed), z(seed ^ 1 << bit)

    def id_bit(bit: int, round: int) -> _Pair:
        return z(round), z(round, _ID ^ 1 << bit)

    def index_bit(bit: int, round: int) -> _Pair:
        return z(round), z(round, offset=1 << bit)

    yield Pairing("halves of a counter", "", halves)
    yield Pairing("next id", "", next_id)
    yield Pairing("next seed", "", next_seed)
    for shift in (1, -1):
        yield Pairing("next seed, neighbouring element", f"element {shift:+d}", partial(neighbour, shift))
    for group, bits, draw in (
        ("one bit of the seed", _SEED_BITS, seed_bit),
        ("one bit of the id", _ID_BITS, id_bit),
        ("one bit of the index", _INDEX_BITS, index_bit),
    ):
        for bit in bits:
            yield Pairing(group, f"bit {bit}", partial(draw, bit))
