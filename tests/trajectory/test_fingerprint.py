"""Fingerprints of weights: the values that trajectories already hold, whatever the tensor's place, cuts and device."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from known_answers import LINES
from matrix import DEVICE
from torch import Tensor

from zo_kernels.spec import mix
from zo_kernels.trajectory import fingerprint
from zo_kernels.trajectory.fingerprint import as_text, combined, summed

COLUMNS = 1 << 14
PINNED = [
    (name, int(n), int(first), value) for name, n, first, value in (x[1:] for x in LINES if x[0] == "fingerprint")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["", "by products", "many rows"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the device has it, and, on a CPU too, what other devices have."""
    if request.param:
        monkeypatch.setattr(fingerprint, "_INTEGER_MV", set())
    if request.param == "many rows":
        monkeypatch.setattr(fingerprint, "_ROWS", {DEVICE.type: 5})


def words(dtype: torch.dtype, n: int, first: int = 0) -> Tensor:
    """Elements with all kinds of bits, NaNs' too."""
    integer = {32: torch.int32, 16: torch.int16}[torch.finfo(dtype).bits]
    return ((torch.arange(first, first + n) * 2654435761) & 0xFFFFFFFF).to(integer).view(dtype).to(DEVICE)


@cache
def slowly(dtype: torch.dtype, n: int, start: int, runs: tuple[int, ...]) -> int:
    """The definition, in Python's integers, of such words: two factors an element, for its column and for its row."""
    t = words(dtype, n, start)
    bits = t.view(torch.int32 if t.element_size() == 4 else torch.int16).tolist()
    length = len(bits) // len(runs)
    index = (first + i for first in runs for i in range(length))
    return sum(w * (mix(i % COLUMNS) | 1) * (mix(COLUMNS + i // COLUMNS) | 1) for w, i in zip(bits, index, strict=True))


def unsigned(total: Tensor) -> int:
    return int(total) % 2**64


@pytest.mark.parametrize(("dtype", "n", "first", "value"), PINNED)
def test_values_are_those_of_trajectories_already_written(dtype: str, n: int, first: int, value: str) -> None:
    t = words(getattr(torch, dtype), n, first)
    assert as_text(int(summed(t, [first])) + n) == value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 767, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS, 2 * COLUMNS + 3])
def test_one_stretch(n: int, dtype: torch.dtype) -> None:
    t = words(dtype, n, 7)
    for first in (0, 1, COLUMNS - 1, COLUMNS, 3 * COLUMNS - 5, 2**33 + 12345):
        assert unsigned(summed(t, [first])) == slowly(dtype, n, 7, (first,)) % 2**64


SHORT = [(1, 9), (3, 5), (384, 50), (COLUMNS // 5, 6), (COLUMNS, 3), (COLUMNS + 1, 3), (5 * COLUMNS // 2 + 1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "count"), SHORT)
def test_many_stretches(length: int, count: int, dtype: torch.dtype) -> None:
    t = words(dtype, length * count).view(count, length)
    spread = random.Random(length).sample(range(10 * count), count)
    for begin in (0, 2**32 - 17):
        runs = [begin + length * i for i in sorted(spread)]
        assert unsigned(summed(t, runs)) == slowly(dtype, length * count, 0, tuple(runs)) % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_add_up_to_the_whole(dtype: torch.dtype) -> None:
    """Wherever it is cut, by rows and by columns."""
    t = words(dtype, 300 * 401).view(300, 401)
    whole = summed(t)
    for cut in (1, 40, 41, 123, 299):
        assert torch.equal(summed(t[:cut]) + summed(t[cut:], [cut * 401]), whole)
    for cut in (1, 200, 400):
        left, right = t[:, :cut].contiguous(), t[:, cut:].contiguous()
        runs = range(0, t.numel(), 401)
        assert torch.equal(summed(left, runs) + summed(right, [first + cut for first in runs]), whole)


def test_a_changed_bit_or_two_elements_exchanged_change_it() -> None:
    t = torch.linspace(-1, 1, 3 * COLUMNS + 11, device=DEVICE)
    seen = {unsigned(summed(t))}
    for place in (0, 1, COLUMNS - 1, COLUMNS, 2 * COLUMNS + 5, len(t) - 1):
        other = t.clone()
        other.view(torch.int32)[place] ^= 1
        seen.add(unsigned(summed(other)))
    for a, b in ((0, 1), (3, COLUMNS + 3), (COLUMNS - 1, COLUMNS), (5, len(t) - 1)):
        other = t.clone()
        other[[a, b]] = t[[b, a]]
        seen.add(unsigned(summed(other)))
    assert len(seen) == 11


def test_nothing_adds_nothing_and_modes_do_not_matter() -> None:
    t = words(torch.float32, 5000)
    assert unsigned(summed(t[:0])) == 0
    assert unsigned(summed(torch.zeros(COLUMNS + 1, device=DEVICE))) == 0
    expected = summed(t)
    with torch.inference_mode():
        inferred = summed(t.clone())
    assert torch.equal(inferred, expected)
    assert not inferred.is_inference()
    parameter = torch.nn.Parameter(t.clone())
    assert torch.equal(summed(parameter), expected)
    assert not summed(parameter).requires_grad


def test_several_are_combined_in_their_order() -> None:
    sums = torch.tensor([3, -5, 7], device=DEVICE)
    assert unsigned(combined(sums)) == sum(s * (mix(i) | 1) for i, s in enumerate(sums.tolist())) % 2**64
    assert unsigned(combined(sums)) != unsigned(combined(sums.flip(0)))
