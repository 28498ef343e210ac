"""The default data set, on every machine that has Python: docstrings of the standard library, labelled by area.

The sources are parsed, never imported: no code of the library runs, and modules that this platform cannot import count,
too. The texts differ a little between Python versions, but not between runs with the same version.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zo_kernels.finetune.data.splits import TextData, split

# Only modules that distributors do not move to packages of their own (as they do with tkinter). Modules that a Python
# version lacks are skipped.
AREAS: Mapping[str, Sequence[str]] = {
    "concurrency": (
        "asyncio", "concurrent", "multiprocessing", "threading", "queue", "sched", "subprocess", "selectors",
    ),
    "math": ("statistics", "fractions", "_pydecimal", "random", "numbers", "colorsys", "bisect", "heapq"),
    "files": (
        "os", "pathlib", "shutil", "tempfile", "zipfile", "tarfile", "gzip", "bz2", "lzma", "posixpath", "ntpath",
        "genericpath", "fileinput", "filecmp", "glob", "fnmatch", "_pyio", "zipimport", "stat",
    ),
}  # fmt: skip
DEV_PER_AREA, TEST_PER_AREA = 50, 100
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_SHORTEST, _LONGEST = 25, 300


def stdlib_docstrings(*, seed: int, root: str | Path | None = None) -> TextData:
    """The first sentences of docstrings, labelled by `AREAS`.

    Every area has the same number of training texts, 100 test texts and 50 development texts.

    Args:
        seed: decides which sentences are held out.
        root: the folder with the sources of the library; None for the running Python's.

    Raises ValueError if the sources are missing or hold too few docstrings.
    """
    texts = collect(root)
    smallest = min(len(sentences) for sentences in texts.values())
    return split(
        texts,
        seed=seed,
        held_out=dict.fromkeys(texts, (DEV_PER_AREA, TEST_PER_AREA)),
        most_train=max(smallest - DEV_PER_AREA - TEST_PER_AREA, 0),
    )


def collect(root: str | Path | None = None) -> dict[str, list[str]]:
    """Area -> first sentences of 25 to 300 characters. A sentence that appears in several areas is left out."""
    folder = Path(root if root is not None else sysconfig.get_path("stdlib"))
    found = {area: _area_sentences(folder, modules) for area, modules in AREAS.items()}
    areas_of = Counter(key for sentences in found.values() for key in sentences)
    return {area: [s for key, s in sentences.items() if areas_of[key] == 1] for area, sentences in found.items()}


def _area_sentences(folder: Path, modules: Sequence[str]) -> dict[str, str]:
    sentences: dict[str, str] = {}
    for module in modules:
        for path in _sources(folder, module):
            for docstring in _docstrings(path):
                sentence = first_sentence(docstring)
                if _SHORTEST <= len(sentence) <= _LONGEST:
                    sentences.setdefault(sentence.casefold(), sentence)
    return sentences


def _sources(folder: Path, module: str) -> list[Path]:
    if (folder / f"{module}.py").is_file():
        return [folder / f"{module}.py"]
    paths = (folder / module).rglob("*.py")
    return sorted(path for path in paths if not _TEST_FOLDERS & set(path.relative_to(folder).parts))


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if docstring := ast.get_docstring(node):
            yield docstring


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    sentence = re.match(r".+?[.!?](?=\s|$)", paragraph)
    return sentence.group() if sentence else paragraph
