"""How many instructions of a disassembled kernel a pass runs: one rule for the kernels of all compilers.

The control flow graph is cut into loops (strongly connected parts). Of those that store weights, the one with the
widest stores goes over the blocks that lie whole in a tensor. Without the instruction by which it is entered, the loops
left in it are those over further directions; what only leads to them is not part of a pass of one direction. Of the
rest, the search for a program's tensor counts by its steps, a loop over ragged blocks not at all, and everything else
once a chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from zo_kernels.backends.tuning import DEFAULT

from .sass import Kernel, entries, leading_to, loops

SEARCH_STEPS = 10  # for a table of 1024 tensors


@dataclass(frozen=True, slots=True)
class Static:
    """Counts of SASS instructions; those an element are of a pass that covers its blocks whole."""

    elements: int  # a thread and block
    first: float  # an element, in a pass of one direction over whole chunks
    further: float  # an element, for each further direction
    outside: float  # the part of `first` that stands outside the loop over blocks
    first_opcodes: dict[str, int]  # a thread and block, in a pass of one direction
    further_opcodes: dict[str, int]
    outside_opcodes: dict[str, int]  # a thread and chunk; the search's instructions once for each of its steps
    registers: int
    float_operations: list[str]  # the PTX opcodes on float32, whose suffixes tell how they round, where there is PTX

    def count(self, prefix: str) -> int:
        """How many instructions have an opcode that starts so."""
        all_three = (self.first_opcodes, self.further_opcodes, self.outside_opcodes)
        return sum(n for opcodes in all_three for opcode, n in opcodes.items() if opcode.startswith(prefix))


def counted(kernel: Kernel, elements: int, registers: int, float_operations: Sequence[str] = ()) -> Static:
    """The instructions of a kernel of `csrc/cuda/kernel.h` or of `backends/triton/kernels.py`.

    Args:
        elements: that a thread works on in a block.

    Raises:
        RuntimeError: its loops are not those of such a kernel.
    """
    everything = set(range(len(kernel.opcodes)))
    parts = loops(kernel, everything)

    def widest_store(part: set[int]) -> tuple[bool, bool]:
        stores = [kernel.opcodes[i] for i in part if kernel.opcodes[i].startswith("STG")]
        return any(opcode.startswith("STG.E.128") for opcode in stores), bool(stores)

    block_loop = max(parts, key=widest_store, default=set[int]())
    searches = [part for part in parts if widest_store(part) == (False, False)]
    heads = entries(kernel, block_loop)
    further = set().union(*loops(kernel, block_loop - heads))
    if len(searches) != 1 or not further:
        raise RuntimeError(f"SASS: expected loops to search, over blocks and in it over directions, got {len(parts)}")
    first = leading_to(kernel, heads, block_loop - further) & block_loop

    def opcodes(part: set[int]) -> Counter[str]:
        return Counter(kernel.opcodes[i] for i in part if kernel.opcodes[i] != "NOP")

    outside = opcodes(everything.difference(*parts))
    for opcode, n in opcodes(searches[0]).items():
        outside[opcode] += SEARCH_STEPS * n
    spread = outside.total() / (elements * DEFAULT.most_blocks)
    return Static(
        elements=elements,
        first=opcodes(first).total() / elements + spread,
        further=opcodes(further).total() / elements,
        outside=spread,
        first_opcodes=dict(opcodes(first).most_common()),
        further_opcodes=dict(opcodes(further).most_common()),
        outside_opcodes=dict(outside.most_common()),
        registers=registers,
        float_operations=list(float_operations),
    )
