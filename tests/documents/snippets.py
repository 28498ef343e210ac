"""What of the documents a reader would run: blocks of Python, and lines of a shell."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

PYTHON, SHELL, TEXT = "python", "shell", "text"
_FENCES = {"python": PYTHON, "bash": SHELL, "sh": SHELL, "shell": SHELL, "console": SHELL, "text": TEXT}
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:zo-finetune|make|pip|python[\d.]*|pytest|torchrun|ls|/tmp/\S+) ?")


@dataclass(frozen=True)
class Block:
    """A block of code: of Python if a fence says so, of shell lines if it is indented and the first is a command."""

    kind: str
    text: str
    line: int  # of the document, from 1

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line, without comments and prompts."""
        lines = (shlex.split(line.removeprefix("$ "), comments=True) for line in self.text.splitlines())
        return [words for words in lines if words]


def blocks(text: str) -> list[Block]:
    """All of a document, in order."""
    found, lines, at = [], text.splitlines(), 0
    while at < len(lines):
        start = at
        if lines[at].startswith("```"):
            while not lines[at + 1].startswith("```"):
                at += 1
            found.append(
                Block(_FENCES[lines[start][3:].strip()], "\n".join(lines[start + 1 : at + 1]) + "\n", start + 2)
            )
            at += 1
        elif lines[at].startswith("    ") and start and not lines[at - 1].strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            body = "\n".join(line[4:] for line in lines[start:at]).strip("\n") + "\n"
            found.append(Block(SHELL if _COMMAND.match(body) else TEXT, body, start + 1))
            at -= 1
        at += 1
    return found


def in_prose(text: str) -> list[str]:
    """Commands that stand in a sentence, some of them only begun: `make demo`, `zo-finetune --resume RUN`."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside))
    return [span for span in spans if _COMMAND.match(span + " ")]


class Failed(Exception):
    """A snippet, by document and line."""


def run(block: Block, names: dict[str, object], path: Path) -> None:
    """As if it stood in a program; an expression whose comment is a number has that value.

    Raises Failed.
    """
    source = "\n" * (block.line - 1) + block.text
    if block.text.lstrip().startswith('"'):  # an entry of a dict
        source = "\n" * (block.line - 1) + "{" + block.text + "}\n"
    lines, at = source.splitlines(), block.line
    try:
        for statement in ast.parse(source, str(path)).body:
            at = statement.lineno
            if not isinstance(statement, ast.Expr):
                exec(compile(ast.Module([statement], []), str(path), "exec"), names)
                continue
            value = eval(compile(ast.Expression(statement.value), str(path), "eval"), names)
            comment = lines[(statement.end_lineno or at) - 1].partition("  # ")[2]
            if re.fullmatch(r"[\d_]+", comment) and value != int(comment):
                raise ValueError(f"expected {comment}, got {value}")
    except Exception as error:
        raise Failed(f"{path.name}, line {at}: {type(error).__name__}: {error}") from error
