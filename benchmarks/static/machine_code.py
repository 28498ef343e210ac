"""Machine code of the kernels, for GPUs that need not be here: disassembled, and counted by one rule for all compilers.

The control flow graph is cut into loops (strongly connected parts). Of those that store weights, the one with the
widest stores goes over the blocks that lie whole in a tensor. Without the instruction by which it is entered, the loops
left in it are those over further directions; what only leads to them is not part of a pass of one direction.

One that holds another loop goes over groups of directions, the inner one over each direction of a group. If there is
code for a full group beside the inner loop, that is what further directions cost, and a pass of one direction goes
through both loops once.

Of what is not in the loop over blocks, the search for a program's tensor counts by its steps, a loop over ragged blocks
not at all, and everything else once a chunk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx  # a dependency of torch

from zo_kernels.backends.tuning import DEFAULT, Tuning
from zo_kernels.backends.types import MaskKind

from ..bench.registry import Unavailable

SEARCH_STEPS = 10  # for a table of 1024 tensors
GROUP = 8  # directions of signs whose words are made together
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<when>@!?U?P\w+\s+)?(?P<opcode>[\w.]+)(?P<operands>.*?);")
_ENDS = ("EXIT", "RET", "KILL")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True)
class Kernel:
    """Instruction i has opcode opcodes[i], and an edge of the graph to each that may follow it."""

    opcodes: list[str]
    graph: networkx.DiGraph
    registers: int = 0
    stack_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """A specialisation of the kernel for one compute capability (80 for 8.0), or for one of AMD's architectures.

    `aligned`, `in_place` and `tuning` are Triton's: for nvcc they are one kernel.
    """

    arch: int | str
    dtype: str
    mask: MaskKind = MaskKind.NONE
    stochastic: bool = False
    aligned: bool = True
    decay: bool = False
    in_place: bool = True
    tuning: Tuning = DEFAULT
    distribution: str = "normal"


@dataclass(frozen=True, slots=True)
class Static:
    """Counts of SASS instructions; those an element are of a pass that covers its blocks whole."""

    elements: int  # a thread and block
    first: float  # an element, in a pass of one direction over whole chunks
    further: float  # an element, for each further direction; of a full group, if directions come in groups
    outside: float  # the part of `first` that stands outside the loop over blocks
    first_opcodes: dict[str, int]  # a thread and block, in a pass of one direction
    further_opcodes: dict[str, int]  # for a further direction, or a full group of them
    outside_opcodes: dict[str, int]  # a thread and chunk; the search's instructions once for each of its steps
    registers: int
    float_operations: list[str]  # the PTX opcodes on float32, whose suffixes tell how they round, where there is PTX

    def count(self, prefix: str) -> int:
        """How many instructions have an opcode that starts so."""
        all_three = (self.first_opcodes, self.further_opcodes, self.outside_opcodes)
        return sum(n for opcodes in all_three for opcode, n in opcodes.items() if opcode.startswith(prefix))


def run(*command: str) -> str:
    """What a command prints; Unavailable if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name}: {done.stderr}")
    return done.stdout


def disassembled(cubin: Path, nvcc: str | None = None) -> dict[str, Kernel]:
    """The kernels of a file by their mangled names, by the tools of the nvcc that made it, or by Triton's."""
    code = kernels(run(_tool("nvdisasm", nvcc), "-c", str(cubin)))
    usage = _USAGE.findall(run(_tool("cuobjdump", nvcc), "--dump-resource-usage", str(cubin)))
    return {name: Kernel(*code[name], int(registers), int(stack)) for name, registers, stack in usage}


def _tool(name: str, nvcc: str | None) -> str:
    """Beside nvcc or on the PATH, else in Triton."""
    if nvcc and (found := shutil.which(name, path=str(Path(nvcc).parent)) or shutil.which(name)):
        return found
    try:
        from triton import knobs
    except ImportError:
        raise Unavailable(f"{name}: expected it beside nvcc, on the PATH or in triton, found none") from None
    return getattr(knobs.nvidia, name).path


def kernels(sass: str) -> dict[str, tuple[list[str], networkx.DiGraph]]:
    """The opcodes and the graph of each kernel in the output of `nvdisasm -c`, by its mangled name."""
    parts = re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]
    return {re.split(r"[,\s]", part, maxsplit=1)[0]: _parsed(part) for part in parts}


def _parsed(text: str) -> tuple[list[str], networkx.DiGraph]:
    found: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _INSTRUCTION.search(line):
            found.append(match)
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(found)))
    for i, match in enumerate(found):
        opcode, to = match["opcode"], re.search(r"`\((\.L_x_\d+)\)", match["operands"])
        # A call that does not come back is a jump too; BSSY only names the place where threads meet again.
        jumps = opcode.startswith("BRA") or opcode == "CALL.REL.NOINC"
        # BRA's own predicate stands among its operands.
        always = match["when"] is None and not (jumps and re.match(r"\s*!?U?P\d", match["operands"]))
        if jumps and to:
            graph.add_edge(i, labels[to[1]])
        if not (always and (jumps or opcode in _ENDS)) and i + 1 < len(found):
            graph.add_edge(i, i + 1)
    return [match["opcode"] for match in found], graph


def counted(kernel: Kernel, elements: int, float_operations: Sequence[str] = ()) -> Static:
    """The instructions of a kernel of `csrc/cuda/kernel.h` or of `backends/triton/kernels.py`.

    Args:
        elements: that a thread works on in a block.

    Raises:
        Unavailable: its loops are not those of such a kernel.
    """
    graph = kernel.graph

    def loops(among: Iterable[int]) -> list[set[int]]:
        return [part for part in networkx.strongly_connected_components(graph.subgraph(among)) if len(part) > 1]

    def entered(part: set[int]) -> set[int]:
        return {i for i in part if set(graph.predecessors(i)) - part}

    def widest_store(part: set[int]) -> tuple[bool, bool]:
        stores = [kernel.opcodes[i] for i in part if kernel.opcodes[i].startswith("STG")]
        return any(opcode.startswith("STG.E.128") for opcode in stores), bool(stores)

    def adds(part: Iterable[int]) -> int:  # one for each element and direction
        return sum(kernel.opcodes[i] == "FADD" for i in part)

    def opcodes(part: Iterable[int]) -> Counter[str]:
        return Counter(kernel.opcodes[i] for i in part if kernel.opcodes[i] != "NOP")

    parts = loops(graph)
    block_loop = max(parts, key=widest_store, default=set[int]())
    searches = [part for part in parts if widest_store(part) == (False, False)]
    heads = entered(block_loop)
    inside = loops(block_loop - heads)
    if len(searches) != 1 or not inside:
        raise Unavailable(f"SASS: expected loops to search, over blocks and in it over directions, got {len(parts)}")
    further, once = set().union(*inside), graph.subgraph(block_loop - set().union(*inside))
    of_further, together = opcodes(further), 1
    if groups := [group for group in inside if loops(group - entered(group))]:
        group, together = groups[0], GROUP
        within = graph.subgraph(group - entered(group))
        each = max(loops(within), key=adds)
        if len(groups) > 1 or not adds(each):
            raise Unavailable(f"SASS: expected one loop over groups of directions, got {len(groups)}")
        ways = (way(within, i) for i in each for way in (networkx.ancestors, networkx.descendants))
        full = set(within).difference(each, *ways)
        around = graph.subgraph(group - each)
        of_further = opcodes(entered(group).union(*(networkx.ancestors(around, head) for head in entered(group))))
        if adds(full):
            once = graph.subgraph(block_loop - full).copy()
            once.remove_edges_from((i, head) for head in entered(group) for i in group)
        else:
            for opcode, n in opcodes(each).items():
                of_further[opcode] += n * GROUP * elements // adds(each)
    first = heads.union(*(networkx.ancestors(once, head) for head in heads))
    outside = opcodes(set(graph).difference(*parts))
    for opcode, n in opcodes(searches[0]).items():
        outside[opcode] += SEARCH_STEPS * n
    spread = outside.total() / (elements * DEFAULT.most_blocks)
    return Static(
        elements=elements,
        first=opcodes(first).total() / elements + spread,
        further=of_further.total() / (elements * together),
        outside=spread,
        first_opcodes=dict(opcodes(first).most_common()),
        further_opcodes=dict(of_further.most_common()),
        outside_opcodes=dict(outside.most_common()),
        registers=kernel.registers,
        float_operations=list(float_operations),
    )
