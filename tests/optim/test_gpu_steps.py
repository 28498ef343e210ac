"""Whole steps on a GPU: the bits of the CPU's, without waiting for the device, few launches, captured in a graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import FAMILIES, block_mlp, four_dimensional
from scripted import METHODS, assert_same, script, snapshot, take_step
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import backends, spec
from zo_kernels.perturbation import slots
from zo_kernels.weights import pinned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PERTURB = ("in_place", "in_forward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HERE = backends.available(torch.device("cuda")) if torch.cuda.is_available() else []
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in HERE, reason=f"the backend {name} cannot run on CUDA here"))
    for name in ("triton", "cuda")
]


def optimizer(method: str, model: nn.Module, **options: Any) -> zo.ZeroOrderOptimizer:
    own: dict[str, Any] = {"anchor_every": 3, "anchor_lr": 0.02} if method == "MeZOSVRG" else {}
    return METHODS[method](model, lr=0.05, eps=1e-2, weight_decay=0.01, **own, **options)


def on_gpu() -> tuple[nn.Module, Any]:
    """A model in bfloat16 whose tensors are all aligned and whose forward does not wait, and its loss."""
    model = block_mlp(width=64).bfloat16().cuda()
    model.embed, model.head = nn.Linear(8, 64).bfloat16().cuda(), nn.Linear(64, 8).bfloat16().cuda()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.25).add_(torch.linspace(-0.5, 0.5, p.numel(), device="cuda").view(p.shape))
    x = torch.linspace(-1, 1, 64, device="cuda").view(8, 8).bfloat16()
    y = torch.arange(8, device="cuda")
    return model, lambda: nn.functional.cross_entropy(model(x).float(), y)


@pytest.fixture
def no_waiting() -> Iterator[Any]:
    """A function after which PyTorch raises wherever it would wait for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("distribution", spec.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_have_the_bits_of_the_cpu(
    backend: str, method: str, perturb: str, dtype: torch.dtype, distribution: str
) -> None:
    ends, options = [], {"perturb": perturb, "directions": 2, "distribution": distribution}
    for device in ("cpu", "cuda"):
        model = block_mlp(dtype=dtype).to(device)
        zero = optimizer(method, model, backend=None if device == "cpu" else backend, **options)
        calls = iter(range(1000))
        x = torch.ones(1, 5, dtype=dtype, device=device)

        def closure(model: Any = model, x: Tensor = x, calls: Any = calls, device: str = device) -> Tensor:
            model(x)
            return torch.tensor(script(next(calls)), dtype=torch.float64).to(device)

        for _ in range(6):
            take_step(zero, closure)
        ends.append(({name: t.cpu() for name, t in snapshot(model).items()}, zero.trajectory.to_bytes()))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_does_not_wait(no_waiting: Any, backend: str, method: str, perturb: str) -> None:
    model, closure = on_gpu()
    zero = optimizer(method, model, perturb=perturb, backend=backend)
    for _ in range(4):  # the first steps compile, and measure the weights
        take_step(zero, closure)
    torch.cuda.synchronize()
    no_waiting()
    for _ in range(7):
        take_step(zero, closure)


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_of_a_step(backend: str) -> None:
    """One a pass: all of this model's tensors are aligned and of one dtype."""
    model, closure = on_gpu()
    zero = optimizer("MeZO", model, perturb="in_place", backend=backend)
    zero.step(closure)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        zero.step(closure)
        torch.cuda.synchronize()
    assert sum("axpy" in event.name for event in profile.events()) == 3


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("method", ["MeZO", "SparseMeZO"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphed_steps(backend: str, method: str, perturb: str) -> None:
    ends, distribution = [], "rademacher" if perturb == "in_forward" else "normal"
    for graph in (False, True):
        model, closure = on_gpu()
        zero = optimizer(method, model, perturb=perturb, directions=2, backend=backend, distribution=distribution)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(zero, 0.9)
        step = zero.graphed(closure) if graph else lambda zero=zero, closure=closure: zero.step(closure)
        losses = []
        for _ in range(8):
            losses.append(step())
            scheduler.step()
        ends.append((snapshot(model), zero.trajectory.to_bytes(), [float(loss) for loss in losses]))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("family", ["OPT", "Llama", "GPT-2", "BERT"])
def test_graphed_transformers(family: str, perturb: str) -> None:
    """With a mask of four dimensions the bits of ordinary steps; with one of two transformers takes another path, and
    that is refused.
    """
    pytest.importorskip("transformers")
    tokens = torch.arange(2, 18, device="cuda").view(2, 8)
    labels = torch.tensor([0, 1], device="cuda") if family == "BERT" else tokens
    ends, ones = [], torch.ones_like(tokens)
    padded = torch.cat([ones[:, :6], torch.tensor([[0, 0], [1, 1]], device="cuda")], dim=1)
    for graph in (False, True):
        torch.manual_seed(3)
        model = FAMILIES[family][0](layers=2).eval().bfloat16().cuda()
        zero = optimizer("MeZO", model, perturb=perturb)

        def closure(mask: Tensor | None = None, model: nn.Module = model, labels: Tensor = labels) -> Tensor:
            masks = four_dimensional(family, padded) if mask is None else {"attention_mask": mask}
            return model(input_ids=tokens, labels=labels, **masks).loss

        step = zero.graphed(closure) if graph else lambda zero=zero, closure=closure: zero.step(closure)
        losses = [float(step()) for _ in range(6)]
        ends.append((snapshot(model), zero.trajectory.to_bytes(), losses))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    step, before = zero.graphed(lambda: closure(ones), warmup=1), zero.step_count
    step()
    with pytest.raises(ValueError, match=r"other operations then: .*masking_utils\.py"):
        step()
    assert zero.step_count == before + 1
    step = zero.graphed(lambda: closure(ones), warmup=1, same_bits=False)
    step(), step()
    assert zero.step_count == before + 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_of_more_than_2_31_elements(backend: str) -> None:
    n = 2**31 + 4096 + 8
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip(f"needs {3 * n / 2**30:.0f} GiB of GPU memory")
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    zo.add_noise_([w], 5, 1.0, backend=backend)
    for start in (0, 2**31 - 2048, n - 2048):
        want = torch.zeros(2048, dtype=torch.bfloat16)
        zo.add_noise_([want], 5, 1.0, param_ids=[0], offsets=[start])
        assert torch.equal(w[start : start + 2048].cpu(), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_weights_that_are_copied_to_the_gpu(method: str, sparsity: float) -> None:
    """The bits of weights that are there already; the copies go beside the work, from pinned memory."""
    ends = []
    for away in (False, True):
        model, closure = on_gpu()
        if away:
            model.cpu()
        where = {"execution_device": "cuda"} if away else {"perturb": "in_forward"}
        zero = optimizer(method, model, sparsity=sparsity, **where)
        losses = [float(take_step(zero, closure)) for _ in range(8)]
        ends.append((snapshot(model.cpu()), losses))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("method", METHODS)
def test_all_that_is_copied_is_pinned(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """In pieces that PyTorch did not round up, whatever the default device is."""
    copied: list[Tensor] = []
    asked: list[int] = []
    fill, allocate = slots.Slots.fill, pinned.allocate

    def noted(self: slots.Slots, sources: Any) -> Any:
        copied.extend(sources)
        return fill(self, sources)

    def counted(nbytes: int) -> Tensor:
        asked.append(nbytes)
        return allocate(nbytes)

    monkeypatch.setattr(slots.Slots, "fill", noted)
    monkeypatch.setattr(pinned, "allocate", counted)
    model, closure = on_gpu()
    model.cpu()
    model.head.weight.requires_grad_(False)
    with torch.device("cuda"):
        zero = optimizer(method, model, sparsity=0.5, execution_device="cuda")
        for _ in range(4):
            take_step(zero, closure)
        zero.load_state_dict(copy.deepcopy(zero.state_dict()))
        for _ in range(4):
            take_step(zero, closure)
    assert copied and all(t.is_pinned() and t.data_ptr() % 64 == 0 for t in copied)
    assert asked and all(n & (n - 1) == 0 for n in asked)


def test_ranks_over_nccl(tmp_path: Any) -> None:
    """One rank, since there may be one GPU: what is sent stays on the device, and nothing changes."""
    from torch import distributed

    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ends = []
        for parallel in ("off", zo.Parallel("batch", check_every=3)):
            model, closure = on_gpu()
            zero = optimizer("MeZO", model, parallel=parallel)
            losses = [float(zero.step(closure)) for _ in range(8)]
            ends.append((snapshot(model), zero.trajectory.to_bytes(), losses))
    finally:
        distributed.destroy_process_group()
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
