"""Scores of a generated answer: exact match and F1 over words, normalised as in SQuAD (arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(answer: str) -> list[str]:
    """The words of an answer in lower case, without ASCII punctuation and without the articles a, an, the."""
    bare = answer.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(answer: str, references: Iterable[str]) -> float:
    """1.0 if the answer has the same words as one of the references, else 0.0."""
    return _best(lambda one, other: float(one == other), answer, references)


def f1(answer: str, references: Iterable[str]) -> float:
    """The harmonic mean of precision and recall over words, for the reference that fits best."""
    return _best(_f1, answer, references)


def _best(measure: Callable[[list[str], list[str]], float], answer: str, references: Iterable[str]) -> float:
    return max(measure(words_of(answer), words_of(reference)) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))
