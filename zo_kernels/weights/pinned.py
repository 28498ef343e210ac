"""Pinned memory of the host, from which a GPU copies beside its work, in few large pieces.

PyTorch rounds every allocation of it up to a power of two: for the parameters of OPT-13B, each by itself, that adds a
quarter to their bytes. So the pieces here are powers of two, and what is moved into them lies side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, device
from torch.utils import dlpack

from ..layouts import ALIGNMENT
from ..modes import inference_mode

# Bytes. A piece is allocated before what goes there has given its memory back, so it should not be large; and below the
# smallest, rounding costs less than another piece.
USUAL, SMALLEST = 2**30, 2**20
FULL = 31 / 32  # of a piece; where tensors do not fill one of the usual size so far, a larger one may be better
_ALIGNED_ITEM = 16  # bytes of the largest item, a complex128


def helps(where: device) -> bool:
    """Whether copies to there are faster from pinned memory."""
    return where.type == "cuda"


def is_pinned(t: Tensor) -> bool:
    """Whether a tensor is in pinned memory."""
    return t.is_pinned()


def allocate(nbytes: int) -> Tensor:
    """Pinned memory, uninitialised, uint8 (nbytes,)."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def pin(tensors: Iterable[Tensor], where: device) -> None:
    """Move the memory of tensors that are on a CPU and will be copied to a GPU into pinned pieces.

    The tensors stay what they are, of the same values, shapes and strides, with a storage that has their bytes and no
    others (so that a file of one does not become one of the whole piece), and those that share memory go on sharing it.
    A piece lives for as long as anything in it. Each tensor's old memory is given up as soon as it was copied: at no
    time is more needed than for the tensors, what pieces leave empty, and one piece.

    Args:
        tensors: of any device and dtype; a tensor may come more than once.
        where: what they will be copied to. If it is no GPU, nothing happens.
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
    """How to lay out so many bytes each.

    Returns:
        The sizes of the pieces, all powers of two; and for each of `sizes` its piece, and where in it it begins, a
        multiple of ALIGNMENT.
    """
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    waiting = sorted(range(len(sizes)), key=lambda i: -aligned[i])  # what is large finds room first
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
    """What `pin` allocates for tensors that share no memory. They may be on the meta device."""
    return sum(plan([_nbytes(t) for t in tensors if t.numel()])[0])


def _next_piece(sizes: Sequence[int]) -> tuple[int, list[int | None]]:
    """A piece for some of what is left, the largest first, and where each begins in it, None if it does not fit."""
    total, least = sum(sizes), _power_of_two(sizes[0])
    if total <= SMALLEST:
        return _power_of_two(total), _filled(_power_of_two(total), sizes)
    most = max(least, _power_of_two(total + 1) // 2)  # or more of it would be empty than not
    first = min(max(least, USUAL), most)
    candidates = [first << k for k in range((most // first).bit_length())]

    def share(piece: int) -> float:
        return sum(size for size, at in zip(sizes, _filled(piece, sizes), strict=True) if at is not None) / piece

    piece = next((c for c in candidates if share(c) >= FULL), None) or max(candidates, key=share)
    return piece, _filled(piece, sizes)


def _filled(piece: int, sizes: Sequence[int]) -> list[int | None]:
    starts: list[int | None] = []
    used = 0
    for size in sizes:
        fits = used + size <= piece
        starts.append(used if fits else None)
        used += size if fits else 0
    return starts


def _power_of_two(n: int) -> int:
    """The smallest that is no less."""
    return 1 << (n - 1).bit_length()


def _nbytes(t: Tensor) -> int:
    """From its first element to its last."""
    return (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _units(tensors: Iterable[Tensor]) -> list[tuple[int, int, list[Tensor]]]:
    """Stretches of memory, by the addresses of begin and end, and the tensors in each: all that overlap are in one."""
    units: list[tuple[int, int, list[Tensor]]] = []
    for t in sorted(tensors, key=lambda t: t.data_ptr()):
        start, end = t.data_ptr(), t.data_ptr() + _nbytes(t)
        if units and start < units[-1][1]:
            first, last, sharing = units[-1]
            # At an address that suits every dtype: they may be of several.
            units[-1] = first - first % _ALIGNED_ITEM, max(last, end), [*sharing, t]
        else:
            units.append((start, end, [t]))
    return units


def _move(sharing: Sequence[Tensor], start: int, memory: Tensor) -> None:
    """Let tensors that share the memory from an address on have `memory`, uint8, instead."""
    with inference_mode(sharing[0].is_inference()):
        # A storage of its own, which keeps the piece alive.
        own = dlpack.from_dlpack(dlpack.to_dlpack(memory))
        for t in sharing:
            at = t.data_ptr() - start
            flat = own[at : at + _nbytes(t)].view(t.dtype)
            flat.copy_(t.detach().as_strided((flat.numel(),), (1,)))
            t.data = flat.as_strided(t.shape, t.stride())
