"""Labelled texts and their split into training, development and test examples."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DELIMITERS = {".tsv": "\t", ".csv": ","}
# Of the texts of a table that brings no test file: the shares held out, and the most development
# examples a label gives, since these are evaluated again and again during a run.
_TEST_SHARE, _DEV_SHARE, _MOST_DEV_PER_LABEL = 0.2, 0.1, 50


@dataclass(frozen=True)
class Split:
    """`texts[i]` is labelled `names[labels[i]]` of the data set it belongs to."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextData:
    """Three splits that share no text. `names` are the labels as a person reads them."""

    names: tuple[str, ...]
    train: Split
    dev: Split
    test: Split


def read_table(path: str | Path) -> dict[str, list[str]]:
    """The texts under each label, in order and without repeats, of a `.tsv` or `.csv` with a header `label,text`.

    A TSV is taken literally (no quoting); a CSV follows the usual quoting. Other columns are ignored.
    Raises ValueError for another suffix, a missing column, an empty field, or bytes that are not UTF-8,
    and FileNotFoundError for a missing file.
    """
    path = Path(path)
    if path.suffix.lower() not in _DELIMITERS:
        raise ValueError(f"{path}: expected a file named .tsv or .csv, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    delimiter = _DELIMITERS[path.suffix.lower()]
    literal = delimiter == "\t"
    texts: dict[str, list[str]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL)
        try:
            columns = rows.fieldnames or []
            if not {"label", "text"} <= set(columns):
                raise ValueError(f"{path}: expected a header with the columns label and text, got {list(columns)}")
            for row in rows:
                label, text = (row["label"] or "").strip(), (row["text"] or "").strip()
                if not label or not text:
                    raise ValueError(f"{path}, line {rows.line_num}: expected a label and a text, got {row}")
                texts.setdefault(label, []).append(text)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a table in UTF-8, got: {error}") from error
    return {label: list(dict.fromkeys(texts[label])) for label in sorted(texts)}


def from_tables(train: str | Path, test: str | Path | None, *, seed: int) -> TextData:
    """A data set from one table, a fifth of it held out as the test, or from a training and a test table.

    Texts of the test are taken out of the training table if they stand in both, so that the test is held out.
    Raises ValueError if there are fewer than two labels, a label of the test is unknown to the training table,
    or a label has too few texts to be split.
    """
    texts = read_table(train)
    if len(texts) < 2:
        raise ValueError(f"{train}: expected at least two labels, got {sorted(texts)}")
    if test is None:
        return split(texts, seed=seed, held_out={label: _held_out(len(t), _TEST_SHARE) for label, t in texts.items()})
    tests = read_table(test)
    if unknown := sorted(set(tests) - set(texts)):
        raise ValueError(f"{test}: expected labels that {train} has, got also {unknown}")
    if not tests:
        raise ValueError(f"{test}: expected at least one example, got none")
    seen = {text for group in tests.values() for text in group}
    texts = {label: [text for text in group if text not in seen] for label, group in texts.items()}
    data = split(texts, seed=seed, held_out={label: _held_out(len(t), 0.0) for label, t in texts.items()})
    return TextData(data.names, data.train, data.dev, _gather(tests, data.names))


def split(
    texts: Mapping[str, Sequence[str]],
    *,
    seed: int,
    held_out: Mapping[str, tuple[int, int]],
    most_train: int | None = None,
) -> TextData:
    """Shuffle each label's texts by `seed` and hold out `(dev, test)` of them; the rest is for training.

    Each label is shuffled by itself, so another label's texts change nothing about its own split.

    Args:
        most_train: use no more than so many training texts of a label.
    Raises ValueError if a label has nothing left to train on.
    """
    parts: dict[str, tuple[Sequence[str], ...]] = {}
    for label, group in texts.items():
        n_dev, n_test = held_out[label]
        if len(group) <= n_dev + n_test:
            raise ValueError(
                f"label {label!r}: expected more than {n_dev + n_test} texts ({n_test} test, {n_dev} development, "
                f"the rest training), got {len(group)}"
            )
        order = list(group)
        random.Random(f"{seed} {label}").shuffle(order)
        parts[label] = (order[n_dev + n_test :][:most_train], order[n_test : n_dev + n_test], order[:n_test])
    names = tuple(texts)
    train, dev, test = (_gather({label: part[k] for label, part in parts.items()}, names) for k in range(3))
    return TextData(names, train, dev, test)


def _held_out(count: int, test_share: float) -> tuple[int, int]:
    dev = min(max(1, round(count * _DEV_SHARE)), _MOST_DEV_PER_LABEL)
    return dev, max(1, round(count * test_share)) if test_share else 0


def _gather(texts: Mapping[str, Sequence[str]], names: Sequence[str]) -> Split:
    pairs = [(text, names.index(label)) for label, group in texts.items() for text in group]
    return Split([text for text, _ in pairs], [label for _, label in pairs])
