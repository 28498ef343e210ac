"""Philox against the vectors that Random123 publishes, normals and signs against our own: the bits may never change."""

from __future__ import annotations

import pytest
import torch
from known_answers import LINES
from matrix import BACKENDS, bits

import zo_kernels as zo
from zo_kernels import _native, spec

PHILOX = [[int(rounds), *(int(w, 16) for w in words)] for kind, rounds, *words in LINES if kind == "philox4x32"]
NOISE = [
    (int(seed, 16), int(param_id, 16), int(offset), [int(z, 16) for z in zs])
    for kind, seed, param_id, offset, *zs in LINES
    if kind == "noise"
]

SIGNS = [
    (int(seed, 16), int(param_id, 16), int(offset), [1.0 - 2.0 * (int(z, 16) >> j & 1) for j in range(64)])
    for kind, seed, param_id, offset, *zs in LINES
    for z in zs
    if kind == "signs"
]
SIGN_ROUNDING = [
    (int(seed, 16), int(param_id, 16), int(offset), [int(rho, 16) for rho in rhos])
    for kind, seed, param_id, offset, *rhos in LINES
    if kind == "sign-rounding"
]


@pytest.mark.parametrize("vector", PHILOX, ids=lambda v: f"{v[0]}-{v[1]:x}")
def test_philox(vector):
    rounds, counter, key, want = vector[0], vector[1:5], vector[5:7], vector[7:]
    got = spec.philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(key), rounds)
    assert [int(w) for w in got] == want
    assert list(_native.philox4x32(counter, key, rounds)) == want


@pytest.mark.parametrize(("seed", "param_id", "offset", "want"), NOISE)
@pytest.mark.parametrize(("backend", "device"), [("reference", torch.device("cpu")), *BACKENDS], ids=lambda x: str(x))
def test_noise(backend, device, seed, param_id, offset, want):
    z = zo.noise(8, seed=seed, param_id=param_id, offset=offset, device=device, backend=backend)
    assert [int(b) % 2**32 for b in bits(z)] == want


@pytest.mark.parametrize(("seed", "param_id", "offset", "want"), SIGNS)
@pytest.mark.parametrize(("backend", "device"), [("reference", torch.device("cpu")), *BACKENDS], ids=lambda x: str(x))
def test_signs(backend, device, seed, param_id, offset, want):
    z = zo.noise(
        64, seed=seed, param_id=param_id, offset=offset, device=device, distribution="rademacher", backend=backend
    )
    assert z.tolist() == want


@pytest.mark.parametrize(("seed", "param_id", "offset", "want"), SIGN_ROUNDING)
def test_rounding_bits_of_signs(seed, param_id, offset, want):
    index = torch.arange(offset, offset + 9)
    assert spec.rounding_bits(index, seed, param_id, "rademacher").tolist() == want


def test_sizes_of_the_vectors():
    # A file that lost its lines would make the tests above pass by doing nothing.
    assert len(PHILOX) == 6 and len(NOISE) == len(SIGNS) == len(SIGN_ROUNDING) == 8
