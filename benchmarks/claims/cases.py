"""`claims`: What the methods' papers claim, measured again."""

from __future__ import annotations

from argparse import Namespace

from ..registry import Case, Row


def cases(options: Namespace) -> list[Case]:
    return []


def cells(row: Row) -> dict[str, str]:
    return {}
