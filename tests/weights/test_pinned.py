"""What is copied to a GPU lies in pinned memory, in few pieces, and is what it was before.

There is no GPU here: ordinary memory stands in for the pinned one, and tells where it is and how much there is of it.
"""

from __future__ import annotations

import copy
import gc
import io
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import block_mlp, real_loss
from scripted import METHODS, assert_same, snapshot, take_step
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.perturbation import slots
from zo_kernels.weights import pinned

CPU = torch.device("cpu")


class Bytes(bytearray):
    """Can be referred to weakly."""


class Host:
    """Memory that is given up when nothing lies in it any more.

    Attributes:
        on_allocate: called before each allocation.
    """

    def __init__(self) -> None:
        self._given: list[tuple[int, int, weakref.ref[Bytes]]] = []
        self.on_allocate: Callable[[int], Any] = lambda nbytes: None

    def allocate(self, nbytes: int) -> Tensor:
        assert nbytes & (nbytes - 1) == 0, "PyTorch would round it up"
        self.on_allocate(nbytes)
        return self.memory(nbytes)

    def memory(self, nbytes: int) -> Tensor:
        owner = Bytes(nbytes + 64)
        skipped = -torch.frombuffer(owner, dtype=torch.uint8).data_ptr() % 64  # pinned memory begins with a page
        made = torch.frombuffer(owner, dtype=torch.uint8, count=nbytes, offset=skipped)
        self._given.append((made.data_ptr(), nbytes, weakref.ref(owner)))
        return made

    @property
    def pieces(self) -> list[int]:
        """Bytes of each that is still there."""
        return [nbytes for _, nbytes, owner in self._given if owner() is not None]

    def holds(self, t: Tensor) -> bool:
        last = t.data_ptr() + t.numel() * t.element_size()
        return any(a <= t.data_ptr() and last <= a + n for a, n, owner in self._given if owner() is not None)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()
    monkeypatch.setattr(pinned, "helps", lambda where: True)
    monkeypatch.setattr(pinned, "allocate", made.allocate)
    monkeypatch.setattr(pinned, "is_pinned", made.holds)
    return made


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that was copied to where modules run."""
    seen: list[Tensor] = []
    fill = slots.Slots.fill

    def noted(self: slots.Slots, sources: Any) -> Any:
        seen.extend(sources)
        return fill(self, sources)

    monkeypatch.setattr(slots.Slots, "fill", noted)
    return seen


def test_plans() -> None:
    """Nothing overlaps, everything is aligned, and little is wasted."""
    draw = random.Random(0)
    for n in (0, 1, 2, 7, 100, 1000):
        for largest in (1, 100, 2**20, 2**29, 2**33):
            sizes = [draw.randint(1, largest) for _ in range(n)]
            pieces, places = pinned.plan(sizes)
            ends = [0] * len(pieces)
            for size, (piece, start) in sorted(zip(sizes, places, strict=True), key=lambda pair: pair[1]):
                assert start % 64 == 0 and start >= ends[piece]
                ends[piece] = start + size
            for piece, end in zip(pieces, ends, strict=True):
                assert 0 < end <= piece and piece & (piece - 1) == 0
            if n >= 100:
                assert sum(pieces) <= 1.07 * sum(-(-size // 64) * 64 for size in sizes) + 2**20


def test_a_piece_is_of_the_usual_size_unless_tensors_do_not_fill_it() -> None:
    assert pinned.plan([2**28] * 40)[0] == [2**30] * 10
    assert pinned.plan([3 * 2**28] * 2)[0] == [2**30, 2**30]
    assert pinned.plan([5 * 2**27] * 64)[0][:2] == [2**34, 2**34]  # 640 MiB each: 1 GiB holds one, 16 GiB hold 25
    assert pinned.plan([2**31 + 2])[0] == [2**32]
    assert pinned.plan([10, 100])[0] == [256]


# GB in 16 bits: of the tensors; if each is pinned by itself; in pieces.
GIGABYTES = {"opt-13b": (25.7, 32.8, 26.4), "llama-7b": (13.5, 17.7, 13.6), "opt-1.3b": (2.6, 2.7, 2.6)}


@pytest.mark.parametrize("name", GIGABYTES)
def test_memory_for_large_models(name: str) -> None:
    pytest.importorskip("transformers")
    from benchmarks.step.shapes import SHAPES

    with torch.device("meta"):
        weights = [torch.empty(p.shape, dtype=torch.bfloat16) for p in SHAPES[name].parameters()]
    asked = [t.numel() * 2 for t in weights]
    alone = [1 << (n - 1).bit_length() for n in asked]
    gigabytes = [n / 1e9 for n in (sum(asked), sum(alone), pinned.bytes_pinned(weights))]
    assert tuple(round(n, 1) for n in gigabytes) == GIGABYTES[name]
    if name == "opt-13b":
        text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
        for method, copies in (("MeZO", 1), ("MeZO-SVRG", 2)):  # which pins its anchors apart
            figures = " | ".join(f"{copies * n:.1f} GB" for n in gigabytes)
            assert f"| {method} | {figures} |" in text


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_steps(host: Host, copied: list[Tensor], method: str, sparsity: float) -> None:
    """The bits of steps without; all that is copied is pinned, also what comes later, or again."""
    options: dict[str, Any] = {"anchor_every": 2, "anchor_lr": 1e-2} if method == "MeZOSVRG" else {}

    def run(streamed: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = nn.Sequential(block_mlp())
        model[0].blocks[1].up.weight.requires_grad_(False)
        where = {"execution_device": "cpu"} if streamed else {"perturb": "in_forward"}
        opt = METHODS[method](model, lr=1e-2, eps=1e-2, sparsity=sparsity, **options, **where)
        seen: list[float] = []

        def go() -> None:
            seen.extend(float(take_step(opt, lambda: real_loss(model, 0))) for _ in range(3))

        go()
        model.append(nn.utils.skip_init(nn.Linear, 3, 3, bias=False))
        nn.init.eye_(model[1].weight.requires_grad_(False))
        go()  # not trained
        opt.add_param_group({"params": [("1.weight", model[1].weight.requires_grad_())]})
        go()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        go()
        for p in (model[0].head.weight, model[0].blocks[1].up.weight):  # trained, and not
            p.data = p.detach().clone()  # in other memory
            go()
        return seen, snapshot(model)

    plain = run(False)
    assert not copied and not host.pieces
    streamed = run(True)
    assert streamed[0] == plain[0]
    assert_same(streamed[1], plain[1])
    assert copied
    for t in copied:
        assert host.holds(t) and t.data_ptr() % 64 == 0
    if method == "MeZOSVRG" and sparsity:
        assert any(t.dtype == torch.uint8 for t in copied)


def test_a_run_that_is_resumed(host: Host, copied: list[Tensor], tmp_path: Path) -> None:
    """The anchors are then those of the file."""
    options: dict[str, Any] = {"lr": 1e-2, "anchor_every": 4, "anchor_lr": 1e-2, "execution_device": "cpu"}
    model = block_mlp()
    opt = zo.MeZOSVRG(model, trajectory=tmp_path / "run.zo", **options)
    for _ in range(2):
        take_step(opt, lambda: real_loss(model, 0))
    other = block_mlp()
    again = zo.MeZOSVRG(other, **options)
    again.resume(tmp_path / "run.zo")
    copied.clear()
    take_step(again, lambda: real_loss(other, 0))
    assert copied and all(host.holds(t) for t in copied)


def test_weights_of_modules_outside_of_the_model(host: Host, copied: list[Tensor]) -> None:
    class Reader(nn.Module):
        def __init__(self, lender: nn.Linear):
            super().__init__()
            self._lender, self.own = [lender], nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.own) @ self._lender[0].bias

    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    reader = Reader(model)
    opt = zo.MeZO(model, lr=0.1, execution_device="cpu")
    for _ in range(2):
        copied.clear()
        opt.step(lambda: reader(model(torch.ones(4))))
    assert sum(t.shape == (4,) for t in copied) > 0
    assert host.holds(reader.own) and all(host.holds(t) for t in copied)


def test_tensors_stay_what_they_are(host: Host) -> None:
    base = torch.arange(100, dtype=torch.float32)
    flat = torch.arange(60, dtype=torch.bfloat16)
    tensors = {
        "contiguous": nn.Parameter(torch.randn(3, 5)),
        "transposed": nn.Parameter(torch.randn(4, 6).t()),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "part": base[1:30:2],
        "overlapping": base[20:40].view(4, 5),
        "apart": base[60:80],
        "odd": flat[1:40],
        "as float": flat[10:30].view(torch.float32),
    }
    with torch.inference_mode():
        tensors["inference"] = torch.ones(7)
    tied = [tensors["contiguous"], tensors["contiguous"]]
    values = {name: t.detach().clone() for name, t in tensors.items()}
    layout = {name: (t.shape, t.stride(), t.dtype, t.is_inference(), id(t)) for name, t in tensors.items()}
    pinned.pin([*tensors.values(), *tied, torch.empty(3, device="meta")], CPU)
    assert len(host.pieces) == 1
    for name, t in tensors.items():
        assert torch.equal(t, values[name])
        assert (t.shape, t.stride(), t.dtype, t.is_inference(), id(t)) == layout[name]
        assert not t.numel() or host.holds(t.detach())
    assert tensors["contiguous"].requires_grad
    with torch.no_grad():
        tensors["overlapping"].fill_(7)
        tensors["as float"].zero_()
    assert tensors["part"].tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, *[7.0] * 5]
    assert tensors["odd"][9:29].abs().sum() == 0 and tensors["odd"][29] == 30
    assert base[30] == 30, "what nobody asked for stays where it is"
    addresses = [t.data_ptr() for t in tensors.values()]
    pinned.pin(tensors.values(), CPU)  # again
    assert addresses == [t.data_ptr() for t in tensors.values()] and len(host.pieces) == 1
    # No file and no copy of one has the others in it.
    t = tensors["contiguous"]
    torch.save(t, file := io.BytesIO())
    assert t.untyped_storage().nbytes() == 60 and file.tell() < 3000
    assert copy.deepcopy(t).untyped_storage().nbytes() == 60


def test_elsewhere_nothing_is_pinned() -> None:
    t = torch.ones(3)
    address = t.data_ptr()
    pinned.pin([t], CPU)
    assert t.data_ptr() == address
    assert pinned.helps(torch.device("cuda")) and not pinned.helps(CPU)


def test_a_piece_lives_for_as_long_as_anything_in_it(host: Host) -> None:
    models = [block_mlp()]
    before = snapshot(models[0])
    opts = [zo.MeZOSVRG(models[0], lr=1e-2, sparsity=0.5, execution_device="cpu")]
    take_step(opts[0], lambda: real_loss(models[0], 0))
    assert len(host.pieces) == 3  # the weights', the anchors', the masks'
    after = snapshot(models[0])
    opts.clear()
    gc.collect()
    assert len(host.pieces) == 1
    assert_same(snapshot(models[0]), after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    zo.MeZO(models[0], lr=1e-2, execution_device="cpu")
    gc.collect()
    assert len(host.pieces) == 1  # the weights were there already
    kept = models[0].blocks[0].up.weight
    models.clear()
    gc.collect()
    assert torch.equal(kept, after["blocks.0.up.weight"]) and len(host.pieces) == 1
    del kept
    assert host.pieces == []


def test_memory_is_not_given_up_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    class Stream:
        def __init__(self, where: torch.device):
            pass

        def synchronize(self) -> None:
            waited.append("for the copies")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    of_gpu = slots.Slots(torch.device("cuda"), False, lambda: None)
    assert waited == []
    del of_gpu
    assert waited == ["for the copies"]


def test_old_memory_is_given_up_on_the_way(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "USUAL", 2**14)
    monkeypatch.setattr(pinned, "SMALLEST", 2**10)
    pageable = Host()
    tensors = [pageable.memory(2**12) for _ in range(64)]
    peaks = []
    host.on_allocate = lambda nbytes: peaks.append(sum(pageable.pieces) + sum(host.pieces) + nbytes)
    pinned.pin(tensors, CPU)
    assert host.pieces == [2**14] * 16 and pageable.pieces == []
    assert max(peaks) == 64 * 2**12 + 2**14


def test_allocations_name_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the host, whatever the default device is."""
    seen: list[dict[str, Any]] = []

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return torch.zeros(args[0], dtype=kwargs["dtype"], device=kwargs.get("device"))

    monkeypatch.setattr(torch, "empty", empty)
    with torch.device("meta"):
        assert pinned.allocate(64).device == CPU
    assert seen == [{"dtype": torch.uint8, "device": "cpu", "pin_memory": True}]
