"""Weights that are copied to where their module runs, just before it does: the same bits, in little memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inside import in_forward_of
from models import FAMILIES, block_mlp, family_loss, real_loss
from scripted import METHODS, assert_same, snapshot, take_step
from shapes import SHAPES, Parent
from torch import nn

import zo_kernels as zo
from zo_kernels.perturbation.streamed import bytes_on_device


def steps(model: nn.Module, method: str, loss: Any, n: int = 4, **options: Any) -> tuple[list[float], Any]:
    if method == "MeZOSVRG":
        options = {"anchor_every": 2, "anchor_lr": 1e-2, **options}
    opt = METHODS[method](model, **{"lr": 1e-2, "eps": 1e-2, "perturb": "in_forward", **options})
    return [float(take_step(opt, lambda: loss(model))) for _ in range(n)], opt


def compared(model: nn.Module, method: str, loss: Any, **options: Any) -> Any:
    """Takes steps with and without; the optimizer with."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    losses, _ = steps(model, method, loss, **options)
    torch.manual_seed(0)
    streamed, opt = steps(other, method, loss, execution_device="cpu", **options)
    assert streamed == losses
    assert_same(snapshot(other), snapshot(model))
    return opt


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "inference" not in name])
def test_modules_that_use_their_weights_in_every_way(name: str) -> None:
    shape, models, seen = SHAPES[name], [], []
    for options in ({}, {"execution_device": "cpu"}):
        torch.manual_seed(1)
        models.append(m := shape.build())
        torch.manual_seed(0)
        opt = zo.MeZO(m, lr=1e-2, eps=1e-2, perturb="in_forward", **options)
        with shape.step_within():
            seen.append([float(opt.step(lambda m=m: shape.loss(m))) for _ in range(3)])
    assert seen[0] == seen[1]
    assert_same(*map(snapshot, models))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"sparsity": 0.5, "distribution": "rademacher"}, {"drop": 0.5, "directions": 2}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    compared(block_mlp(dtype=dtype), method, lambda model: real_loss(model, 0), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_part_of_the_weights_frozen(family: str) -> None:
    pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FAMILIES[family][0](layers=2).eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    compared(model, "MeZO", lambda m: family_loss(family, m))


def test_every_byte_is_copied_once_a_forward_into_two_slots() -> None:
    """One for the module that runs, one for the next."""
    model = block_mlp()
    model.blocks[1].up.weight.requires_grad_(False)
    _, opt = steps(model, "LeZO", lambda m: real_loss(m, 0), n=3, directions=2, execution_device="cpu")
    forwards = 3 * 2 * 2
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    engine = in_forward_of(opt)
    assert engine.bytes_copied == forwards * model_bytes
    assert engine.bytes_on_device == bytes_on_device(model) < model_bytes


@pytest.mark.parametrize(
    ("size", "gigabytes"),
    [
        ({"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40}, 1.03),  # 13B
        ({"hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96, "num_attention_heads": 96}, 2.47),  # 175B
    ],
)
def test_memory_for_the_weights_of_large_models(size: dict[str, int], gigabytes: float) -> None:
    """In bf16; two slots of the embedding's size."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(word_embed_proj_dim=size["hidden_size"], **size, dtype="bfloat16")
        ).bfloat16()
    assert sum(p.numel() for p in model.parameters()) > size["num_hidden_layers"] * 12 * size["hidden_size"] ** 2
    assert round(bytes_on_device(model) / 1e9, 2) == gigabytes


def test_modules_within_modules_have_a_slot_each() -> None:
    model = Parent(Parent(nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 6))))
    _, opt = steps(model, "MeZO", lambda m: m(torch.ones(2, 6)).square().sum(), lr=0.0, execution_device="cpu")
    assert in_forward_of(opt).bytes_on_device == 2 * bytes_on_device(model)


def test_another_order_of_modules_in_every_forward() -> None:
    """What was sent for is not what runs next."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            for i in range(3 + self.calls % 3):
                x = torch.tanh(self.parts[(self.calls * i) % 5](x))
            return x.sum()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shuffled()
    compared(model, "MeZO", lambda m: m(torch.ones(4)), n=6)


def test_forwards_between_steps() -> None:
    """They run on copies of the weights as they are, in the same slots."""
    model = block_mlp()
    opt = zo.MeZO(model, lr=1e-2, perturb="in_forward", execution_device="cpu")
    engine, size = in_forward_of(opt), sum(p.numel() * p.element_size() for p in model.parameters())
    for _ in range(2):
        expected = real_loss(model, 3).item()
        copied = engine.bytes_copied
        with opt.streaming():
            assert real_loss(model, 3).item() == expected
        assert engine.bytes_copied == copied + size
        real_loss(model, 3)
        assert engine.bytes_copied == copied + size
        opt.step(lambda: real_loss(model, 0))
    plain = zo.MeZO(model, lr=1e-2)
    with plain.streaming():
        assert real_loss(model, 3).item() == real_loss(model, 3).item()


@pytest.mark.parametrize("error", [KeyError("lost"), KeyboardInterrupt()])
def test_what_a_closure_raises_leaves_everything_as_it_was(error: BaseException) -> None:
    model = block_mlp()
    model.head.weight.requires_grad_(False)
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    opt = zo.MeZO(model, lr=0.1, perturb="in_forward", execution_device="cpu")
    calls = []

    def fails(module: nn.Module, args: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise error

    model.blocks[2].down.register_forward_pre_hook(fails)
    with pytest.raises(type(error)):
        opt.step(lambda: real_loss(model, 0))
    assert_same(snapshot(model), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert opt.step(lambda: real_loss(model, 0)) > 0


def test_an_operation_that_fails_on_weights_of_two_devices_is_a_read() -> None:
    """On a GPU a read of what was not copied is an error of the operation; here its shapes stand for the devices."""

    class Reads(nn.Module):
        def __init__(self, lender: nn.Linear, away: set[int]):
            super().__init__()
            self.lender, self.away, self.reader = lender, away, Reader(lender, away)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.reader(x) + self.lender(x)

    class Reader(nn.Module):
        def __init__(self, lender: nn.Linear, away: set[int]):
            super().__init__()
            self.away, self._weights = away, [lender.weight, lender.bias]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, bias = self._weights
            for t in (weight, bias):
                if t.data_ptr() in self.away:
                    t.flatten() @ torch.ones(t.numel() + 1)
            return x @ weight + bias

    for frozen in (False, True):
        lender = nn.Linear(4, 4)
        lender.bias.requires_grad_(not frozen)
        model = Reads(lender, {lender.weight.data_ptr(), lender.bias.data_ptr()})
        opt = zo.MeZO(model, lr=0.1, perturb="in_forward", execution_device="cpu")
        assert torch.isfinite(opt.step(lambda model=model: model(torch.ones(4)).square().sum()))


class Outside(nn.Module):
    """Reads a weight of a model that it is no part of."""

    def __init__(self, lender: nn.Linear):
        super().__init__()
        self._lender = [lender]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._lender[0].bias


def test_modules_outside_of_the_model_that_read_what_is_not_trained() -> None:
    def model() -> nn.Linear:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            lender = nn.Linear(4, 4)
        lender.bias.requires_grad_(False)
        return lender

    plain, streamed = model(), model()
    zo.MeZO(plain, lr=0.1, perturb="in_forward").step(lambda: Outside(plain)(plain(torch.ones(4))))
    reader = Outside(streamed)
    zo.MeZO(streamed, lr=0.1, execution_device="cpu").step(lambda: reader(streamed(torch.ones(4))))
    assert_same(snapshot(streamed), snapshot(plain))
    opt = zo.MeZO(streamed, lr=0.1, execution_device="cpu")
    with pytest.raises(ValueError, match="a module that is created in every call reads a tensor that is not trained"):
        opt.step(lambda: Outside(streamed)(streamed(torch.ones(4))))
    with pytest.raises(ValueError, match=r"it reads a tensor that is not trained, of shape \(4,\), .* keep it there"):
        opt.step(lambda: streamed.bias @ streamed(torch.ones(4)))


def test_arguments_that_do_not_fit() -> None:
    model = block_mlp()
    with pytest.raises(ValueError, match="execution_device: expected perturb='in_forward' with it, got 'in_place'"):
        zo.MeZO(model, lr=0.1, perturb="in_place", execution_device="cpu")
    with pytest.raises(ValueError, match=r"execution_device: it needs .* cannot be: it needs the module"):
        zo.MeZO(list(model.parameters()), lr=0.1, execution_device="cpu")
    with pytest.raises(
        ValueError, match="execution_device: expected a device that PyTorch can use here, got 'cuda:99'"
    ):
        zo.MeZO(model, lr=0.1, execution_device="cuda:99")
    with pytest.raises(ValueError, match="execution_device: expected a device with memory, got 'meta'"):
        zo.MeZO(model, lr=0.1, execution_device="meta")
    with pytest.raises(
        ValueError,
        match=r"weights are copied to where the forward runs in every step; use opt\.step",
    ):
        zo.MeZO(model, lr=0.1, execution_device="cpu").graphed(lambda: 0.0)
