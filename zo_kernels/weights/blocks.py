"""Which parameters belong to which transformer block, and which blocks a step drops (LeZO, arXiv 2410.09823)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..spec import mix


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: members of the outermost `nn.ModuleList`s of two or more modules of one class
    that are themselves made of modules (OPT `decoder.layers`, Llama `layers`, GPT-2 `h`, BERT `layer`, T5 `block` of
    encoder and decoder). Lists inside a block (experts, T5's sublayers) are part of that block.

    Raises:
        ValueError: there are none; say which they are with `blocks=`.
    """
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            members = list(child) if isinstance(child, nn.ModuleList) else []
            same = len(members) >= 2 and len({type(m) for m in members}) == 1
            if same and all(any(True for _ in m.children()) for m in members):
                blocks.extend(members)
            else:
                visit(child)

    visit(model)
    if not blocks:
        raise ValueError(
            f"drop: found no list of transformer blocks in {type(model).__name__}; name them with blocks=[module, ...]"
        )
    return blocks


def block_of_parameters(blocks: Sequence[nn.Module]) -> dict[Tensor, int]:
    """Each parameter -> the index of its block. One that several blocks share belongs to none: it is never dropped."""
    owner: dict[Tensor, int] = {}
    shared: set[Tensor] = set()
    for i, block in enumerate(blocks):
        for p in block.parameters():
            if owner.setdefault(p, i) != i:
                shared.add(p)
    return {p: i for p, i in owner.items() if p not in shared}


def how_many(n_blocks: int, drop: float) -> int:
    """Blocks that a step drops: round(drop * n_blocks), and at most n_blocks - 1."""
    return min(round(drop * n_blocks), n_blocks - 1)


def of_no_use(n_blocks: int, drop: float, block_of: Mapping[Tensor, int], trained: Sequence[Tensor]) -> str | None:
    """Why dropping blocks does not do what it is for, or None."""
    count = how_many(n_blocks, drop)
    blocks = {block_of.get(p) for p in trained}
    if count < 1:
        return f"{drop} of {n_blocks} blocks is none, so that every step trains all; give a larger drop, or 0"
    if blocks <= {None}:
        return (
            f"no trained parameter is in one of the {n_blocks} blocks alone, so that every step trains all; give drop=0"
        )
    if None not in blocks and len(blocks) <= count:
        return (
            f"of {n_blocks} blocks {count} are dropped in a step, and all trained parameters are in {len(blocks)}, so "
            "that some steps train nothing; give a smaller drop, or name with blocks=[...] those that are trained"
        )
    return None


def dropped_blocks(n_blocks: int, drop: float, draw: int) -> frozenset[int]:
    """`how_many` block indices, uniform at random as the 64-bit `draw` decides."""
    count = how_many(n_blocks, drop)
    order = sorted(range(n_blocks), key=lambda i: mix(draw + i + 1))
    return frozenset(order[:count])
