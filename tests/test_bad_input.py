"""Bad input to the primitive: each row raises, names what was wrong and what came, and no weight has changed a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import INF, NAN, TOO_LARGE, Row, rows
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.backends import native


def add(w: list[Tensor], **options: Any) -> None:
    """A call that is right but for the options."""
    zo.add_noise_(**{"tensors": w, "seeds": 1, "scales": 1.0, **options})


def adding(argument: str, *cases: tuple[Any, type[Exception], str]) -> dict[str, Row]:
    return rows(argument, lambda w, v: add(w, **{argument: v}), *cases)


def with_tensor(t: Callable[[], Any]) -> Callable[[list[Tensor]], None]:
    return lambda w: add([w[0], t()])


ADD_NOISE: dict[str, Row] = {
    # The tensors.
    "one tensor, not a sequence": (
        lambda w: add(w[0]),
        TypeError,
        r"tensors: expected a sequence, got (Tensor|Parameter)",
    ),
    "a generator": (lambda w: add(t for t in w), TypeError, r"tensors: expected a sequence, got generator"),
    "not a tensor": (with_tensor(lambda: 1.0), TypeError, r"tensors\[1\]: .*Tensor, got float"),
    "with gaps": (with_tensor(lambda: torch.ones(4, 3)[:, :2]), ValueError, r"tensors\[1\]: .*gaps.*\(3, 1\).*clone"),
    "expanded": (with_tensor(lambda: torch.ones(1).expand(4)), ValueError, r"tensors\[1\]: .*repeats.*\(0,\)"),
    "integers": (with_tensor(lambda: torch.ones(4, dtype=torch.int32)), TypeError, r"tensors\[1\]: .*got int32"),
    "booleans": (with_tensor(lambda: torch.ones(4, dtype=torch.bool)), TypeError, r"tensors\[1\]: .*got bool"),
    "float64": (with_tensor(lambda: torch.ones(4, dtype=torch.float64)), TypeError, r"tensors\[1\]: .*got float64"),
    "complex": (with_tensor(lambda: torch.ones(4, dtype=torch.complex64)), TypeError, r"tensors\[1\]: .*got complex64"),
    "float8": (
        with_tensor(lambda: torch.ones(4).to(torch.float8_e4m3fn)),
        TypeError,
        r"tensors\[1\]: .*got float8_e4m3fn",
    ),
    "meta": (with_tensor(lambda: torch.ones(4, device="meta")), ValueError, r"tensors\[1\]: .*meta"),
    "sparse": (with_tensor(lambda: torch.ones(4).to_sparse()), TypeError, r"tensors\[1\]: .*got torch.sparse_coo"),
    "sparse rows": (
        with_tensor(lambda: torch.ones(4, 4).to_sparse_csr()),
        TypeError,
        r"tensors\[1\]: .*got torch.sparse_csr",
    ),
    "twice": (lambda w: add([w[0], w[1], w[0]]), ValueError, r"tensors\[[02]\]: .*overlap.*tensors\[[02]\]"),
    "overlapping": (
        lambda w: add([w[0], w[0].detach().view(-1)[7:]]),
        ValueError,
        r"tensors\[1\]: .*overlap.*tensors\[0\]",
    ),
    # Directions.
    **adding(
        "seeds",
        (-1, ValueError, r"seeds\[0\]: .*got -1"),
        (2**64, ValueError, rf"seeds\[0\]: .*got {2**64}"),
        (1.0, TypeError, r"seeds\[0\]: .*got float 1.0"),
        (True, TypeError, r"seeds\[0\]: .*got bool True"),
        (None, TypeError, r"seeds\[0\]: .*got NoneType"),
        ("1", TypeError, r"seeds: expected a sequence, got str"),
        ([1], TypeError, r"scales: expected a sequence, got float"),
    ),
    **adding(
        "scales",
        (NAN, ValueError, r"scales\[0\]: .*got nan"),
        (INF, ValueError, r"scales\[0\]: .*got inf"),
        (-INF, ValueError, r"scales\[0\]: .*got -inf"),
        (TOO_LARGE, ValueError, r"scales\[0\]: .*got 1e\+39"),
        (-TOO_LARGE, ValueError, r"scales\[0\]: .*got -1e\+39"),
        (None, TypeError, r"scales\[0\]: .*got NoneType"),
        (1j, TypeError, r"scales\[0\]: .*got complex"),
        (False, TypeError, r"scales\[0\]: .*got bool"),
        ([1.0], TypeError, r"seeds: expected a sequence, got int"),
    ),
    "more seeds than scales": (
        lambda w: add(w, seeds=[1, 2], scales=[1.0]),
        ValueError,
        r"scales: expected 2 entries, got 1",
    ),
    "more scales than seeds": (
        lambda w: add(w, seeds=[1], scales=[1.0, 2.0]),
        ValueError,
        r"scales: expected 1 entries, got 2",
    ),
    "no direction": (lambda w: add(w, seeds=[], scales=[]), ValueError, r"seeds: .*at least one"),
    "a bad second seed": (
        lambda w: add(w, seeds=[1, 2**64], scales=[1.0, 1.0]),
        ValueError,
        r"seeds\[1\]: .*got 18446744073709551616",
    ),
    "a bad second scale": (
        lambda w: add(w, seeds=[1, 2], scales=[1.0, NAN]),
        ValueError,
        r"scales\[1\]: .*got nan",
    ),
    # What goes with each tensor.
    **adding(
        "param_ids",
        ([1], ValueError, r"param_ids: expected 2 entries, got 1"),
        ([1, -1], ValueError, r"tensors\[1\]: param_id: .*got -1"),
        ([1, 2**32], ValueError, r"tensors\[1\]: param_id: .*got 4294967296"),
        ([1, "a"], TypeError, r"tensors\[1\]: param_id: .*got str"),
        (5, TypeError, r"param_ids: expected a sequence, got int"),
    ),
    **adding(
        "offsets",
        ([0, 0, 0], ValueError, r"offsets: expected 2 entries, got 3"),
        ([0, -4], ValueError, r"tensors\[1\]: offset: .*got -4"),
        ([2**63 - 1, 0], ValueError, r"tensors\[0\]: offset: .*got 9223372036854775807"),
        ([0, 0.5], TypeError, r"tensors\[1\]: offset: .*got float"),
        (0, TypeError, r"offsets: expected a sequence, got int"),
    ),
    **adding(
        "masks",
        ([None], ValueError, r"masks: expected 2 entries, got 1"),
        ([None, NAN], ValueError, r"masks\[1\]: .*got nan"),
        ([None, "all"], TypeError, r"masks\[1\]: .*got str"),
        ([None, True], TypeError, r"masks\[1\]: .*got bool"),
        ([None, torch.ones(5)], TypeError, r"masks\[1\]: .*got float32"),
        ([None, torch.ones(6, dtype=torch.bool)], ValueError, r"masks\[1\]: .*\(5,\), got \(6,\)"),
        ([None, torch.ones(5, dtype=torch.bool, device="meta")], ValueError, r"masks\[1\]: .*cpu, got meta"),
        ([None, torch.ones(5, dtype=torch.bool).to_sparse()], TypeError, r"masks\[1\]: .*dense.*sparse_coo"),
        ([torch.ones(4, 3, dtype=torch.bool), None], ValueError, r"masks\[0\]: .*\(3, 4\), got \(4, 3\)"),
        (0.5, TypeError, r"masks: expected a sequence, got float"),
    ),
    # The pass.
    **adding(
        "decay",
        (NAN, ValueError, r"decay: .*got nan"),
        (-INF, ValueError, r"decay: .*got -inf"),
        (TOO_LARGE, ValueError, r"decay: .*got 1e\+39"),
        ("1", TypeError, r"decay: .*got str"),
        ([1.0, 1.0], TypeError, r"decay: .*got list"),
    ),
    **adding(
        "rounding",
        ("up", ValueError, r"rounding: .*'nearest'.*got 'up'"),
        ("auto", ValueError, r"rounding: .*got 'auto'"),
        (None, TypeError, r"rounding: .*got NoneType"),
    ),
    **adding(
        "backend",
        (
            "cuda9",
            ValueError,
            r"backend: expected None or one of 'reference'|backend: expected None or one of reference",
        ),
        (7, TypeError, r"backend: .*got int"),
    ),
}


def making(z: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda w: z(**{"shape": 4, "seed": 0, **options})


NOISE: dict[str, Row] = {
    "noise(dtype=float64)": (
        making(zo.noise, dtype=torch.float64),
        TypeError,
        r"dtype: .*got torch.float64|dtype: .*got float64",
    ),
    "noise(dtype=int)": (making(zo.noise, dtype=int), TypeError, r"dtype: "),
    "noise(shape=-1)": (making(zo.noise, shape=-1), ValueError, r"shape\[0\]: .*got -1"),
    "noise(shape=(2, 1.5))": (making(zo.noise, shape=(2, 1.5)), TypeError, r"shape\[1\]: .*got float"),
    "noise(shape='4')": (making(zo.noise, shape="4"), TypeError, r"shape: .*got str"),
    "noise(seed=-1)": (making(zo.noise, seed=-1), ValueError, r"seed: .*got -1"),
    "noise(seed=2**64)": (making(zo.noise, seed=2**64), ValueError, r"seed: .*got 18446744073709551616"),
    "noise(seed=None)": (making(zo.noise, seed=None), TypeError, r"seed: .*got NoneType"),
    "noise(param_id=2**32)": (making(zo.noise, param_id=2**32), ValueError, r"param_id: .*got 4294967296"),
    "noise(offset=2**63)": (making(zo.noise, offset=2**63), ValueError, r"offset: .*got 9223372036854775808"),
    "noise(device='meta')": (making(zo.noise, device="meta"), ValueError, r"device: expected a device with memory"),
    "noise(device='gpu')": (
        making(zo.noise, device="gpu"),
        ValueError,
        r"^device: expected .* got 'gpu': .+$",
    ),
    "noise(backend='gpu')": (making(zo.noise, backend="gpu"), ValueError, r"backend: .*got 'gpu'"),
}


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaf = nn.Parameter(torch.randn(3, 4, generator=generator))
    return [leaf, torch.randn(5, generator=generator).to(torch.bfloat16)]


@pytest.mark.parametrize("row", {**ADD_NOISE, **NOISE})
def test_add_noise_and_noise_refuse(row: str) -> None:
    call, error, message = {**ADD_NOISE, **NOISE}[row]
    w = weights()
    with pytest.raises(error, match=message):
        call(w)
    assert all(torch.equal(a, b) for a, b in zip(w, weights(), strict=True))


def test_what_is_not_bad_input() -> None:
    """Leaves stay leaves; empty tensors, lists and masks of infinity are nothing special."""
    leaf, grown = weights()[0], weights()[0] * 2
    zo.add_noise_([leaf, torch.empty(0), torch.empty(0, 3)], 2**64 - 1, -0.0, masks=[INF, 0.0, None])
    zo.add_noise_([], 0, 1.0)
    assert leaf.is_leaf and leaf.requires_grad and leaf.grad is None
    assert torch.equal(leaf, weights()[0])
    # torch's own in-place operations refuse leaves unless told; a result of autograd is a plain tensor here.
    zo.add_noise_([grown.detach()], 0, 1.0)


@pytest.mark.parametrize(
    "backend, sets, message",
    [
        ("native:avx512", ["scalar"], r"backend: 'native:avx512' cannot run here: .*avx512.*only scalar"),
        ("native:avx2", ["scalar"], r"backend: 'native:avx2' cannot run here: .*avx2.*only scalar"),
        ("native", None, r"backend: 'native' cannot run here: .*not built.*(reinstall|compiler)"),
        (None, None, r"backend: 'native' cannot run here: .*not built.*(reinstall|compiler)"),
    ],
    ids=["no AVX-512", "no AVX2", "not built", "not built, by default"],
)
def test_a_backend_that_cannot_run_says_why(
    backend: str | None, sets: list[str] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sets is None:
        monkeypatch.setattr(native, "_native", None)
        monkeypatch.setattr(native, "_missing", "the native extension is not built; reinstall", raising=False)
    else:
        monkeypatch.setattr(native, "instruction_sets", lambda: sets)
    w = weights()
    for call in (
        lambda: add(w, backend=backend),
        lambda: zo.noise(3, seed=0, backend=backend),
        lambda: zo.MeZO([w[0]], lr=1.0, backend=backend),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(w[0], weights()[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs tensors on two devices")
def test_mixed_devices_are_refused() -> None:
    w = weights()
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected device cpu.*got cuda"):
        add([w[0], w[1].cuda()])
    with pytest.raises(ValueError, match=r"masks\[0\]: .*cpu, got cuda"):
        add(w[:1], masks=[torch.ones(3, 4, dtype=torch.bool, device="cuda")])
