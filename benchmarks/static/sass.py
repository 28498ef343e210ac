"""Disassembled kernels: instructions, the graph of their jumps, and its loops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<when>@!?U?P\w+\s+)?(?P<opcode>[\w.]+)(?P<operands>.*?);")
_ENDS = ("EXIT", "RET", "KILL")


@dataclass(frozen=True, slots=True)
class Kernel:
    """Instruction i has opcode opcodes[i] and may be followed by those in following[i]."""

    opcodes: list[str]
    following: list[list[int]]


def kernels(sass: str) -> Iterator[tuple[str, Kernel]]:
    """(mangled name, kernel) of each one in the output of `nvdisasm -c`."""
    for part in re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]:
        yield re.split(r"[,\s]", part, maxsplit=1)[0], _parse(part)


def _parse(text: str) -> Kernel:
    found: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _INSTRUCTION.search(line):
            found.append(match)
    following = []
    for i, match in enumerate(found):
        opcode, to = match["opcode"], re.search(r"`\((\.L_x_\d+)\)", match["operands"])
        # A call that does not come back is a jump too; BSSY only names the place where threads meet again.
        jumps = opcode.startswith("BRA") or opcode == "CALL.REL.NOINC"
        # BRA's own predicate stands among its operands.
        always = match["when"] is None and not (jumps and re.match(r"\s*!?U?P\d", match["operands"]))
        then = [labels[to[1]]] if jumps and to else []
        if not (always and (jumps or opcode in _ENDS)) and i + 1 < len(found):
            then.append(i + 1)
        following.append(then)
    return Kernel([match["opcode"] for match in found], following)


def loops(kernel: Kernel, among: Set[int]) -> list[set[int]]:
    """Strongly connected parts of more than one instruction, of the graph cut down to some (Tarjan's algorithm)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    parts = []
    for root in sorted(among):
        if root in order:
            continue
        path: list[tuple[int, Iterator[int]]] = []
        enter: int | None = root
        while enter is not None or path:
            if enter is not None:
                order[enter] = low[enter] = len(order)
                stack.append(enter)
                path.append((enter, iter(kernel.following[enter])))
                enter = None
            at, rest = path[-1]
            for then in rest:
                if then in among and then not in order:
                    enter = then
                    break
                if then in among and then in low:
                    low[at] = min(low[at], low[then])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[at])
                if low[at] == order[at]:
                    part = set(stack[stack.index(at) :])
                    del stack[-len(part) :]
                    for member in part:
                        del low[member]
                    if len(part) > 1:
                        parts.append(part)
    return parts


def entries(kernel: Kernel, loop: Set[int]) -> set[int]:
    """The loop's instructions that are reached from outside it."""
    return {then for i, thens in enumerate(kernel.following) if i not in loop for then in thens if then in loop}


def leading_to(kernel: Kernel, ends: Set[int], among: Set[int]) -> set[int]:
    """Those from which one of `ends` is reached within `among`, and `ends`."""
    before: dict[int, list[int]] = {}
    for i in among:
        for then in kernel.following[i]:
            before.setdefault(then, []).append(i)
    reached, todo = set(ends), list(ends)
    while todo:
        for i in before.get(todo.pop(), []):
            if i not in reached:
                reached.add(i)
                todo.append(i)
    return reached
