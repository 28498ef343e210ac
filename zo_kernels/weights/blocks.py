"""Which parameters belong to which transformer block, and which blocks a step drops (LeZO, arXiv 2410.09823)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..spec import mix


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Find the repeated blocks of a model.

    Blocks are the members of the outermost `nn.ModuleList`s that hold two or more modules of one class, each with
    submodules of its own: OPT's `decoder.layers`, Llama's `layers`, GPT-2's `h`, BERT's `layer`, T5's `block` in both
    encoder and decoder. A list inside a block (experts, T5's sublayers) belongs to that block.

    Raises:
        ValueError: the model has none; name them with `blocks=`.
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
    """Map each parameter to the index of its block. One that several blocks share is left out: never dropped."""
    owner: dict[Tensor, int] = {}
    shared: set[Tensor] = set()
    for i, block in enumerate(blocks):
        for p in block.parameters():
            if owner.setdefault(p, i) != i:
                shared.add(p)
    return {p: i for p, i in owner.items() if p not in shared}


def dropped_count(n_blocks: int, drop: float) -> int:
    """The number of blocks that a step drops: round(drop * n_blocks), but at most n_blocks - 1."""
    return min(round(drop * n_blocks), n_blocks - 1)


def why_drop_is_useless(
    n_blocks: int, drop: float, block_of: Mapping[Tensor, int], trained: Sequence[Tensor]
) -> str | None:
    """Why this `drop` has no effect, or leaves some steps with nothing to train; None if it is fine."""
    count = dropped_count(n_blocks, drop)
    blocks = {block_of.get(p) for p in trained}
    if count < 1:
        return f"{drop} of {n_blocks} blocks rounds to none, so every step trains all of them; give a larger drop, or 0"
    if blocks <= {None}:
        return (
            f"none of the {n_blocks} blocks has a trained parameter of its own, so every step trains all; give drop=0"
        )
    if None not in blocks and len(blocks) <= count:
        return (
            f"a step drops {count} of {n_blocks} blocks, but only {len(blocks)} have trained parameters, so some steps "
            "would train nothing; give a smaller drop, or name the trained blocks with blocks=[...]"
        )
    return None


def dropped_blocks(n_blocks: int, drop: float, draw: int) -> frozenset[int]:
    """The indices of `dropped_count` blocks, uniformly at random: a pure function of the 64-bit `draw`."""
    count = dropped_count(n_blocks, drop)
    order = sorted(range(n_blocks), key=lambda i: mix(draw + i + 1))
    return frozenset(order[:count])
