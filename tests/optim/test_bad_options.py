"""Bad input to optimizers: each row raises, names what was wrong and what came, and no weight has changed a bit.

Each row is a call that makes an optimizer of a small model `m`, or uses one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import INF, NAN, TOO_LARGE, Row, rows
from models import Holder, block_mlp
from torch import Tensor, nn

import zo_kernels as zo


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
        zo.SparseMeZO,
        "mask",
        ("fixed", ValueError, r"mask: expected one of 'redrawn', 'kept', got 'fixed'"),
        (None, TypeError, r"mask: .*got NoneType"),
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
        "distribution",
        ("uniform", ValueError, r"distribution: expected one of 'normal', 'rademacher', got 'uniform'"),
        (None, TypeError, r"distribution: .*got NoneType"),
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
    **option(
        zo.MeZOSVRG,
        "anneal",
        (1.0, ValueError, r"anneal: .*\(1.0, inf\), got 1.0"),
        (NAN, ValueError, r"anneal: .*got nan"),
        ("5", TypeError, r"anneal: .*got str"),
    ),
    **option(
        zo.MeZOSVRG,
        "anneal_above",
        (0.95, ValueError, r"anneal_above: .*got 0.95"),
        (None, TypeError, r"anneal_above: .*got NoneType"),
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
