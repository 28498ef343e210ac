"""JSON files that others may have edited: read up to a size limit, and checked against expected types."""

from __future__ import annotations

import json
import reprlib
import stat
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

MOST_BYTES = 1 << 22  # of a file
_MOST_WHOLE = 2**63
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def check_file(path: Path) -> None:
    """Raise ValueError if the path is not a regular file, FileNotFoundError if it does not exist."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise ValueError(f"{path}: expected a regular file")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the path is not a file, the file is too large, or it does not hold a JSON object.
    """
    check_file(path)
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: expected at most {MOST_BYTES} bytes, got more")
    return parse(str(path), data)


def parse(where: str, data: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8. Raises ValueError that names `where`."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where}: expected a JSON object in UTF-8: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {reprlib.repr(value)}")
    return value


def check(
    where: str, values: Mapping[str, Any], hints: Mapping[str, Any], optional: Collection[str] = ()
) -> dict[str, Any]:
    """Check fields against types, and return them converted: lists to tuples, whole numbers to floats where asked.

    Args:
        where: the file, for messages.
        values: field -> value.
        hints: field -> type, made of bool, int, float, str, None, dict, tuple[X, ...], and unions of these.
        optional: fields that may be missing.

    Raises ValueError that names the first field that is missing, unknown or of the wrong type.
    """
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(
            f"{where}: {reprlib.repr(unknown[0])}: unknown field; was the file written by another version?"
        )
    for name in hints:
        if name not in values and name not in optional:
            raise ValueError(f"{where}: {name}: expected {_told(hints[name])}, but the field is missing")
    result = {}
    for name, value in values.items():
        try:
            result[name] = _converted(value, hints[name])
        except (TypeError, OverflowError):
            raise ValueError(f"{where}: {name}: expected {_told(hints[name])}, got {reprlib.repr(value)}") from None
    return result


def _converted(value: Any, hint: Any) -> Any:
    """The value as a type. Raises TypeError or OverflowError if it has another type."""
    if get_origin(hint) in (Union, types.UnionType):
        for each in get_args(hint):
            try:
                return _converted(value, each)
            except (TypeError, OverflowError):
                continue
        raise TypeError
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_converted(each, get_args(hint)[0]) for each in value)
    if hint is None or hint is type(None):
        if value is not None:
            raise TypeError
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise TypeError
    if hint is int and not -_MOST_WHOLE <= value < _MOST_WHOLE:
        raise OverflowError
    return value


def _told(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_told, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each {_told(get_args(hint)[0])}"
    return _WORDS.get(hint, "an object")
