"""Code of a checkout that a user points to, run from where it is."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.registry import Unavailable


def commit(path: Path) -> str | None:
    """The commit that is checked out; None if git cannot tell."""
    command = ["git", "-C", str(path), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def methods(file: Path, of: str, names: Sequence[str], given: Mapping[str, Any]) -> type:
    """A class with only these methods of a class in a file, which is not imported.

    So the methods run although the file's imports (older packages, loggers, GPUs) cannot.

    Args:
        file: Python source.
        of: the class.
        names: of the methods.
        given: what they read of their module.

    Raises:
        Unavailable: the file, the class or a method is not there.
    """
    if not file.is_file():
        raise Unavailable(f"there is no file {file.name} in {file.parent}")
    tree = ast.parse(file.read_text(), str(file))
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == of), None)
    if found is None:
        raise Unavailable(f"there is no class {of} in {file}")
    body = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name in names]
    if missing := set(names) - {n.name for n in body}:
        raise Unavailable(f"{of} in {file} has no {', '.join(sorted(missing))}")
    found.bases, found.keywords, found.decorator_list, found.body = [], [], [], list(body)
    namespace = {"__name__": f"checkout.{file.stem}", **given}
    # The user's own checkout, which they ask to be run.
    exec(compile(ast.Module(body=[found], type_ignores=[]), str(file), "exec"), namespace)
    return namespace[of]


def bare_package(folder: Path) -> None:
    """Make a package's modules importable without running its `__init__`.

    Raises:
        Unavailable: there is no such folder.
    """
    if not folder.is_dir():
        raise Unavailable(f"there is no package {folder.name} in {folder.parent}")
    spec = importlib.machinery.ModuleSpec(folder.name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[folder.name] = importlib.util.module_from_spec(spec)
