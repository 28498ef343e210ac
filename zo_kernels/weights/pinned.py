"""Pinned host memory in few large pieces: a GPU copies from it while it computes.

PyTorch rounds every pinned allocation up to a power of two. Pinning the parameters of OPT-13B one by one would take a
quarter more bytes than they have. Here the pieces are powers of two, and many tensors lie side by side in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, device
from torch.utils import dlpack

from ..layouts import ALIGNMENT
from ..modes import inference_mode

# Bytes of a piece. It is allocated before its tensors give their old memory back, so it should not be large. Below the
# smallest size, rounding wastes less than one more piece would.
USUAL, SMALLEST = 2**30, 2**20
FULL = 31 / 32  # if tensors fill less of a piece of the usual size, larger pieces are tried
_ALIGNED_ITEM = 16  # bytes of the largest element, a complex128


def helps(where: device) -> bool:
    """Whether copies to this device are faster from pinned memory."""
    return where.type == "cuda"


def is_pinned(t: Tensor) -> bool:
    """Whether a tensor lies in pinned memory."""
    return t.is_pinned()


def allocate(nbytes: int) -> Tensor:
    """Allocate pinned memory: an uninitialised uint8 tensor of shape (nbytes,)."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def pin(tensors: Iterable[Tensor], where: device) -> None:
    """Move CPU tensors that will be copied to a GPU into pinned pieces; changes their `data` in place.

    Values, shapes and strides stay the same, and tensors that share memory still share it. Each storage covers its own
    bytes only, so that saving one tensor does not save the whole piece. A piece lives as long as any tensor in it. Each
    tensor's old memory is released as soon as it has been copied, so the peak is the tensors, the gaps in the pieces,
    and one piece.

    Args:
        tensors: of any device and dtype; those not on a CPU are left alone, and a tensor may come more than once.
        where: the device they will be copied to. If it is no GPU, nothing happens.
    """
    if not helps(where):
        return
    each = {id(t): t for t in tensors}.values()
    units = _units(t for t in each if t.device.type == "cpu" and t.numel() and not is_pinned(t))
    pieces, places = plan([end - start for start, end, _ in units])
    contents: list[list[int]] = [[] for _ in pieces]
    for i, (piece, _) in enumerate(places):
        contents[piece].append(i)
    with torch.no_grad():
        for size, content in zip(pieces, contents, strict=True):
            memory = allocate(size)
            for i in content:
                start, end, sharing = units[i]
                at = places[i][1]
                _move(sharing, start, memory[at : at + end - start])


def plan(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Lay out tensors of these sizes in bytes.

    Returns:
        The sizes of the pieces, all powers of two; and for each of `sizes` the index of its piece and its offset there,
        a multiple of ALIGNMENT.
    """
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    waiting = sorted(range(len(sizes)), key=lambda i: -aligned[i])  # the largest first
    pieces: list[int] = []
    places = [(0, 0)] * len(sizes)
    while waiting:
        piece, starts = _next_piece([aligned[i] for i in waiting])
        for i, start in zip(waiting, starts, strict=True):
            if start is not None:
                places[i] = len(pieces), start
        waiting = [i for i, start in zip(waiting, starts, strict=True) if start is None]
        pieces.append(piece)
    return pieces, places


def bytes_pinned(tensors: Iterable[Tensor]) -> int:
    """The bytes that `pin` allocates for tensors that share no memory; they may be on the meta device."""
    return sum(plan([_nbytes(t) for t in tensors if t.numel()])[0])


def _next_piece(sizes: Sequence[int]) -> tuple[int, list[int | None]]:
    """The size of the next piece, and each remaining tensor's offset in it, None if it does not fit; largest first."""
    total, least = sum(sizes), _power_of_two(sizes[0])
    if total <= SMALLEST:
        return _power_of_two(total), _filled(_power_of_two(total), sizes)
    most = max(least, _power_of_two(total + 1) // 2)  # a larger piece would be more than half empty
    first = min(max(least, USUAL), most)
    candidates = [first << k for k in range((most // first).bit_length())]

    def share(piece: int) -> float:
        return sum(size for size, at in zip(sizes, _filled(piece, sizes), strict=True) if at is not None) / piece

    piece = next((c for c in candidates if share(c) >= FULL), None) or max(candidates, key=share)
    return piece, _filled(piece, sizes)


def _filled(piece: int, sizes: Sequence[int]) -> list[int | None]:
    """The offsets of tensors put into a piece one after the other, None for those that do not fit."""
    starts: list[int | None] = []
    used = 0
    for size in sizes:
        fits = used + size <= piece
        starts.append(used if fits else None)
        used += size if fits else 0
    return starts


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _nbytes(t: Tensor) -> int:
    """Bytes from the first element of a tensor to its last."""
    return (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _units(tensors: Iterable[Tensor]) -> list[tuple[int, int, list[Tensor]]]:
    """Ranges of memory (start and end address) with the tensors in each; tensors that overlap are in one range."""
    units: list[tuple[int, int, list[Tensor]]] = []
    for t in sorted(tensors, key=lambda t: t.data_ptr()):
        start, end = t.data_ptr(), t.data_ptr() + _nbytes(t)
        if units and start < units[-1][1]:
            first, last, sharing = units[-1]
            # Tensors of several dtypes may share the range: start at an address that suits all of them.
            units[-1] = first - first % _ALIGNED_ITEM, max(last, end), [*sharing, t]
        else:
            units.append((start, end, [t]))
    return units


def _move(sharing: Sequence[Tensor], start: int, memory: Tensor) -> None:
    """Move tensors that share the memory from address `start` on into `memory`, a uint8 tensor."""
    with inference_mode(sharing[0].is_inference()):
        # A storage of their own, which keeps the piece alive.
        own = dlpack.from_dlpack(dlpack.to_dlpack(memory))
        for t in sharing:
            at = t.data_ptr() - start
            flat = own[at : at + _nbytes(t)].view(t.dtype)
            flat.copy_(t.detach().as_strided((flat.numel(),), (1,)))
            t.data = flat.as_strided(t.shape, t.stride())
