"""Bad input: one table. Each row raises, names what was wrong and what came, and no weight has changed a bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Holder, block_mlp
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.backends import native

NAN, INF = math.nan, math.inf
TOO_LARGE = 1e39  # finite, but infinite in float32, where the arithmetic is done

Row = tuple[Callable[..., Any], type[Exception], str]


def shown(value: Any) -> str:
    """For the row's name."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value.dtype}{list(value.stride())}@{value.device}" if isinstance(value, Tensor) else str(value)


def rows(name: str, call: Callable[[Any], Any], *cases: tuple[Any, type[Exception], str]) -> dict[str, Row]:
    """Rows that differ in one value: the message begins with the argument's name and ends with what came."""
    out: dict[str, Row] = {}
    for value, error, came in cases:
        out[f"{name}={shown(value)}"] = (lambda w, v=value: call(w, v), error, came)
    return out


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


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers. `m` is a small model; every row is a call that makes an optimizer of it, or uses one.


def option(cls: type, name: str, *cases: tuple[Any, type[Exception], str]) -> dict[str, Row]:
    made = rows(name, lambda m, v: cls(m, **{"lr": 0.1, name: v}), *cases)
    return {f"{cls.__name__}({key})": row for key, row in made.items()}


class Elsewhere(nn.Parameter):
    """It says that it is on a device that need not be here."""

    device = torch.device("cuda:1")


def with_weight(t: Callable[[], Tensor]) -> Callable[[nn.Module], Any]:
    def call(m: nn.Module) -> Any:
        m.register_parameter("odd", nn.Parameter(t()))
        return zo.MeZO(m, lr=0.1)

    return call


def after_a_step(change: Callable[[zo.ZeroOrderOptimizer], Any], cls: type = zo.MeZO) -> Callable[[nn.Module], Any]:
    """A change that is bad, then a step that must refuse it. A first step with lr 0 has been taken without harm."""

    def call(m: nn.Module) -> None:
        opt = cls(m, lr=0.0, eps=2.0**-20, **({"anchor_lr": 0.0} if cls is zo.MeZOSVRG else {}))
        change(opt)
        opt.step(*[lambda: 1.0] * (2 if cls is zo.MeZOSVRG else 1))

    return call


def frozen(m: nn.Module) -> nn.Module:
    return m.requires_grad_(False)


TWO_GROUPS = [0.1, 0.2]

OPTIMIZERS: dict[str, Row] = {
    **option(
        zo.MeZO,
        "lr",
        (-0.1, ValueError, r"lr: .*got -0.1"),
        (NAN, ValueError, r"lr: .*got nan"),
        (INF, ValueError, r"lr: .*got inf"),
        ("fast", TypeError, r"lr: .*got str"),
        (None, TypeError, r"lr: .*got NoneType"),
        (torch.ones(2), TypeError, r"lr: .*got Tensor"),
    ),
    **option(
        zo.MeZO,
        "eps",
        (0.0, ValueError, r"eps: .*got 0.0"),
        (-1e-3, ValueError, r"eps: .*got -0.001"),
        (NAN, ValueError, r"eps: .*got nan"),
        (TOO_LARGE, ValueError, r"eps: .*got 1e\+39"),
        (1e-60, ValueError, r"eps: .*got 1e-60"),  # zero in float32: no probe would move
        ("1", TypeError, r"eps: .*got str"),
    ),
    **option(
        zo.MeZO,
        "weight_decay",
        (-1.0, ValueError, r"weight_decay: .*got -1.0"),
        (NAN, ValueError, r"weight_decay: .*got nan"),
    ),
    **option(
        zo.SparseMeZO,
        "sparsity",
        (1.0, ValueError, r"sparsity: .*got 1.0"),
        (-0.1, ValueError, r"sparsity: .*got -0.1"),
        (75, ValueError, r"sparsity: .*got 75"),
        (NAN, ValueError, r"sparsity: .*got nan"),
    ),
    **option(
        zo.LeZO,
        "drop",
        (1.0, ValueError, r"drop: .*got 1.0"),
        (-0.1, ValueError, r"drop: .*got -0.1"),
        (NAN, ValueError, r"drop: .*got nan"),
    ),
    **option(
        zo.MeZO,
        "directions",
        (0, ValueError, r"directions: .*got 0"),
        (2**16 + 1, ValueError, r"directions: .*got 65537"),
        (1.5, TypeError, r"directions: .*got float"),
    ),
    **option(
        zo.MeZO,
        "seed",
        (-1, ValueError, r"seed: .*got -1"),
        (2**64, ValueError, r"seed: .*got 18446744073709551616"),
        (0.5, TypeError, r"seed: .*got float"),
    ),
    **option(
        zo.MeZO,
        "perturb",
        ("sideways", ValueError, r"perturb: .*got 'sideways'"),
        (True, TypeError, r"perturb: .*got bool"),
    ),
    **option(
        zo.MeZO,
        "rounding",
        ("down", ValueError, r"rounding: .*got 'down'"),
        (0, TypeError, r"rounding: .*got int"),
    ),
    **option(
        zo.MeZO,
        "backend",
        ("gpu", ValueError, r"backend: .*got 'gpu'"),
        (0, TypeError, r"backend: .*got int"),
    ),
    **option(
        zo.LeZO,
        "blocks",
        ([], ValueError, r"blocks: .*at least one.*got none"),
        ([3], TypeError, r"blocks\[0\]: .*got int"),
        ("layers", TypeError, r"blocks: .*got str"),
    ),
    **option(
        zo.MeZOSVRG,
        "anchor_every",
        (0, ValueError, r"anchor_every: .*got 0"),
        (2.0, TypeError, r"anchor_every: .*got float"),
    ),
    **option(
        zo.MeZOSVRG,
        "anchor_lr",
        (-1.0, ValueError, r"anchor_lr: .*got -1.0"),
        (NAN, ValueError, r"anchor_lr: .*got nan"),
        ("1", TypeError, r"anchor_lr: .*got str"),
    ),
    **option(zo.MeZOSVRG, "shared_direction", (1, TypeError, r"shared_direction: .*got int")),
    "a misspelt option": (lambda m: zo.LeZO(m, lr=0.1, dorp=0.5), TypeError, r"dorp"),
    # Parameters.
    "no parameters": (lambda m: zo.MeZO([], lr=0.1), ValueError, r"empty parameter list"),
    "a module without parameters": (lambda m: zo.MeZO(nn.ReLU(), lr=0.1), ValueError, r"empty parameter list"),
    "all frozen": (lambda m: zo.MeZO(frozen(m), lr=0.1), ValueError, r"params: .*at least one.*got none"),
    "one tensor": (lambda m: zo.MeZO(m.head.weight, lr=0.1), TypeError, r"got.*Tensor|Parameter"),
    "twice": (
        lambda m: zo.MeZO([{"params": [m.head.weight]}, {"params": [m.head.weight]}], lr=0.1),
        ValueError,
        r"more than one",
    ),
    "overlapping parameters": (
        lambda m: zo.MeZO([("a", m.head.weight), ("b", nn.Parameter(m.head.weight.data[1:]))], lr=0.1),
        ValueError,
        r"b: .*overlap.*memory that a has",
    ),
    "float64 parameter": (with_weight(lambda: torch.ones(3).double()), TypeError, r"odd: .*got float64"),
    "complex parameter": (with_weight(lambda: torch.ones(3) * 1j), TypeError, r"odd: .*got complex64"),
    "meta parameter": (
        with_weight(lambda: torch.ones(3, device="meta")),
        ValueError,
        r"odd: .*meta.*execution_device=",
    ),
    "parameters of two devices": (
        lambda m: zo.MeZO([m.head.weight, Elsewhere(m.head.bias.data)], lr=0.1),
        ValueError,
        r"1: expected device cpu, where 0 is, got cuda:1; .*fully_shard.*execution_device=",
    ),
    "parameter with gaps": (with_weight(lambda: torch.ones(3, 4)[:, 1:]), ValueError, r"odd: .*without gaps"),
    "sparse parameter": (with_weight(lambda: torch.ones(3).to_sparse()), TypeError, r"odd: .*sparse_coo"),
    "blocks of bare parameters": (lambda m: zo.LeZO(m.parameters(), lr=0.1), ValueError, r"drop: .*blocks="),
    "no blocks": (lambda m: zo.LeZO(m.head, lr=0.1), ValueError, r"drop: .*no list of transformer blocks in Linear"),
    # Groups.
    **{
        f"a group with {name}={value}": (
            lambda m, name=name, value=value: zo.MeZO(
                [{"params": [m.head.weight]}, {"params": [m.head.bias], name: value}], lr=0.1
            ),
            ValueError,
            rf"param_groups\[1\]: {name}: .*got {re.escape(str(value))}",
        )
        for name, value in (("lr", -1.0), ("eps", 0.0), ("weight_decay", -1.0), ("sparsity", 1.0))
    },
    "an added group with a bad rate": (
        lambda m: zo.MeZO([m.head.weight], lr=0.1).add_param_group({"params": [m.head.bias], "lr": NAN}),
        ValueError,
        r"param_groups\[1\]: lr: .*got nan",
    ),
    "an added group with a bad anchor rate": (
        lambda m: zo.MeZOSVRG([m.head.weight], lr=0.1).add_param_group({"params": [m.head.bias], "anchor_lr": -1}),
        ValueError,
        r"anchor_lr: .*got -1",
    ),
    **{
        f"an added group that is no dict, {cls.__name__}": (
            lambda m, cls=cls: cls([m.head.weight], lr=0.1).add_param_group([m.head.bias]),
            TypeError,
            r"(?i)param.group.*dict.*|.*list.*mapping",
        )
        for cls in (zo.MeZO, zo.MeZOSVRG)
    },
    "eps for float16": (
        lambda m: zo.MeZO(m.half(), lr=0.1, eps=1e5),
        ValueError,
        r"^eps: expected at most 1024 for float16 weights, got 100000.0",
    ),
    "eps for float16, in one group": (
        lambda m: zo.MeZO([{"params": [m.half().head.weight]}, {"params": [m.head.bias], "eps": 1e5}], lr=0.1),
        ValueError,
        r"^eps: expected at most 1024 for float16 weights, got 100000.0",
    ),
    "groups of different eps": (
        lambda m: zo.MeZO([{"params": [m.head.weight]}, {"params": [m.head.bias], "eps": 0.5}], lr=0.1).step(
            lambda: 1.0
        ),
        ValueError,
        r"eps: expected one value.*\[0.001, 0.5\]",
    ),
    # What somebody sets between steps.
    **{
        f"{name} set to {value}": (
            after_a_step(lambda opt, name=name, value=value: opt.param_groups[0].update({name: value})),
            ValueError,
            rf"{name}: .*got {re.escape(str(value))}",
        )
        for name, value in (("lr", NAN), ("lr", -1.0), ("eps", 0.0), ("eps", INF), ("eps", 1e31), ("weight_decay", NAN))
    },
    "anchor_lr set to nan": (
        after_a_step(lambda opt: opt.param_groups[0].update(anchor_lr=NAN), zo.MeZOSVRG),
        ValueError,
        r"anchor_lr: .*got nan",
    ),
    # Closures.
    "no closure": (lambda m: zo.MeZO(m, lr=0.1).step(), TypeError, r"closure"),
    "a loss for a closure": (lambda m: zo.MeZO(m, lr=0.1).step(torch.tensor(1.0)), TypeError, r"closure: .*got Tensor"),
    "None for a closure": (lambda m: zo.MeZO(m, lr=0.1).step(None), TypeError, r"closure: .*got NoneType"),
    "no full closure": (lambda m: zo.MeZOSVRG(m, lr=0.1).step(lambda: 1.0), TypeError, r"full_closure: .*got NoneType"),
    "a loss for a full closure": (
        lambda m: zo.MeZOSVRG(m, lr=0.1).step(lambda: 1.0, 1.0),
        TypeError,
        r"full_closure: .*got float",
    ),
}


@pytest.mark.parametrize("row", OPTIMIZERS)
def test_optimizers_refuse(row: str) -> None:
    call, error, message = OPTIMIZERS[row]
    model = block_mlp(depth=2)
    with pytest.raises(error, match=message):
        call(model)
    dtype = model.head.weight.dtype
    for name, t in block_mlp(depth=2, dtype=dtype).named_parameters():
        assert torch.equal(model.get_parameter(name), t), name


@pytest.mark.parametrize("cls", [zo.MeZO, zo.SparseMeZO, zo.LeZO, zo.MeZOSVRG])
@pytest.mark.parametrize(
    "replacement, error, message",
    [
        (torch.ones(4, 6)[:, ::2], ValueError, r"w: .*without gaps"),
        (torch.ones(4, 3, dtype=torch.float64), TypeError, r"w: .*got float64"),
    ],
    ids=["gaps", "float64"],
)
def test_memory_replaced_by_what_cannot_be_changed(
    cls: type, replacement: Tensor, error: type[Exception], message: str
) -> None:
    model = Holder(w=torch.ones(4, 3), v=torch.ones(5))
    opt = cls(model, lr=0.1, drop=0.0)
    model.w.data = replacement
    with pytest.raises(error, match=message):
        opt.step(*[lambda: 1.0] * (2 if cls is zo.MeZOSVRG else 1))
    assert torch.equal(model.v, torch.ones(5))
    assert torch.equal(model.w, torch.ones(4, 3, dtype=replacement.dtype))


@pytest.mark.parametrize(
    "replacement",
    [torch.full((4, 3), 2.0, dtype=torch.bfloat16), torch.full((64, 3), 2.0), torch.full((2, 3), 2.0)],
    ids=["another dtype", "larger", "smaller"],
)
def test_an_anchor_of_another_dtype_or_size_is_not_read(replacement: Tensor) -> None:
    """model.to(bfloat16), or new embeddings, in the middle of a period: a new anchor, or an error, but no garbage."""
    model = Holder(w=torch.full((4, 3), 2.0))
    opt = zo.MeZOSVRG(model, lr=1e-3, anchor_lr=1e-3, eps=1e-3, perturb="in_place")
    closures = [lambda: model.w.float().sum().item()] * 2
    for _ in range(2):
        opt.step(*closures)
    model.w.data = replacement.clone()
    try:
        opt.step(*closures)
    except (TypeError, ValueError) as error:
        assert re.search(r"w: ", str(error))
        assert torch.equal(model.w, replacement)
    assert model.w.shape == replacement.shape and model.w.dtype == replacement.dtype
    assert ((model.w.float() - 2).abs() < 0.5).all()
