"""Labelled texts and their split into training, development and test examples."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zo_kernels.finetune.data import tables

TEST_EXAMPLES = 1000  # at most, if nothing is asked for
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
    """Three splits that share no text. `names` are the labels as a person reads them.

    `notes` are what a person must know of how they came about.
    """

    names: tuple[str, ...]
    train: Split
    dev: Split
    test: Split
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """The texts of a table under each label, labels in the order of their names, texts in that of the file, none twice.

    `lines` has the line of each text by its `_key`; `labels` and `rows` count those of the table that are not repeated.
    """

    texts: dict[str, list[str]]
    lines: dict[str, int]
    notes: list[str]
    labels: int
    rows: int


def read_table(path: str | Path) -> dict[str, list[str]]:
    """The texts under each label, in order and without repeats, of a table with the columns label and text (`tables`).

    Raises as `labelled`.
    """
    return labelled(path).texts


def labelled(path: str | Path) -> Labelled:
    """A table with the columns label and text. Texts are left as they are, white space around labels is taken off.

    A text that stands there again is left out; so are all of a text that stands under several labels. Texts are the
    same if their words are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is wrong (`tables.read`), or has no label or no text; the message says which.
    """
    table = tables.read(path, ("label", "text"))
    found: dict[str, tuple[str, str, int]] = {}
    repeats, disagreeing, doubtful, labels = tables.Count(), tables.Count(), set(), set()
    for row, line in zip(table.rows, table.lines, strict=True):
        label, text = row["label"], row["text"]
        if type(label) is int:  # of JSON
            label = str(label)
        for name, value in (("label", label), ("text", text)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"{path}, line {line}: {name}: expected a text, got {value!r:.80}: fill it in, or take the row out"
                )
        label, key = label.strip(), _key(text)
        labels.add(label)
        other, _, before = found.setdefault(key, (label, text, line))
        if before != line:
            (repeats if other == label else disagreeing)(f"line {line}, as line {before}")
            if other != label:
                doubtful.add(key)
    texts: dict[str, list[str]] = {label: [] for label in sorted({label for label, _, _ in found.values()})}
    for key, (label, text, _) in found.items():
        if key not in doubtful:
            texts[label].append(text)
    notes = [*table.notes]
    for line_of in (
        repeats.told("1 row repeats another and is left out", "{} rows repeat others and are left out"),
        disagreeing.told(
            "1 row has the text of another and a different label; both are left out",
            "{} rows have the texts of others and different labels; all of these are left out",
        ),
        _alike(texts),
    ):
        notes += [f"{path}: {told}" for told in line_of]
    lines = {key: line for key, (_, _, line) in found.items()}
    return Labelled(texts, lines, notes, len(labels), len(table.rows) - repeats.times)


def _key(text: str) -> str:
    """What two texts share that are the same but for white space."""
    return " ".join(text.split())


def _alike(labels: Iterable[str]) -> Iterator[str]:
    """Labels that are probably meant to be one."""
    plain: dict[str, str] = {}
    for label in labels:
        other = plain.setdefault(_key(label).casefold(), label)
        if other != label:
            yield f"the labels {other!r} and {label!r} differ by capitals or spaces alone, and are two"


def from_tables(
    train: str | Path, test: str | Path | None, *, seed: int, test_examples: int | str | None = None
) -> TextData:
    """A data set from one table, a fifth of it held out as the test, or from a training and a test table.

    Texts of the test are taken out of the training table if they stand in both, so that the test is held out.

    Args:
        train, test: the tables.
        seed: draws the development examples, and the test if there is no table of it.
        test_examples: as `with_test`.

    Raises ValueError if there are fewer than two labels, a label of the test is unknown to the training table,
    or a label has too few texts to be split.
    """
    table = labelled(train)
    texts, notes = table.texts, table.notes
    _check_labels(train, table)
    if len(texts) < 2:
        raise ValueError(f"{train}: expected at least two labels, got {sorted(texts)}")
    tests = None
    if test is not None:
        tests, more = _test_of(test, train, table)
        notes = notes + more
        seen = {_key(text) for group in tests.values() for text in group}
        texts = {label: [text for text in group if _key(text) not in seen] for label, group in texts.items()}
    share = _TEST_SHARE if tests is None else 0.0
    try:
        data = split(texts, seed=seed, held_out={label: _held_out(len(t), share) for label, t in texts.items()})
    except ValueError as error:
        raise ValueError(f"{train}: {error}{'' if tests is None else f', without the texts of {test}'}") from None
    held_out = data.test if tests is None else _gather(tests, data.names)
    return with_test(TextData(data.names, data.train, data.dev, held_out, tuple(notes)), test_examples)


def _check_labels(path: str | Path, table: Labelled) -> None:
    if 2 * table.labels > table.rows > 3:
        some = reprlib.repr(list(table.texts))
        raise ValueError(
            f"{path}: expected a few labels of many texts each, got {table.labels} labels of {table.rows} texts: {some}"
            "; are the columns label and text exchanged?"
        )


def _test_of(path: str | Path, train: str | Path, training: Labelled) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of a test table, and what is said of them. Raises ValueError if it does not belong to the other."""
    table = labelled(path)
    if unknown := [label for label in table.texts if label not in training.texts]:
        known = reprlib.repr(list(training.texts))
        firsts = {label: table.texts[label][0] for label in unknown if table.texts[label]}
        some = [f"{label!r} (line {table.lines[_key(text)]})" for label, text in firsts.items()]
        raise ValueError(
            f"{path}: expected labels that {train} has, {known}, got also {', '.join(some[:3]) or unknown}"
            f"{f' and {len(some) - 3} others' if len(some) > 3 else ''}"
        )
    if not any(table.texts.values()):
        raise ValueError(f"{path}: expected at least one example, got none")
    notes, shared = [*table.notes], tables.Count()
    for group in table.texts.values():
        for text in group:
            if (line := training.lines.get(_key(text))) is not None:
                shared(f"line {table.lines[_key(text)]}, line {line} there")
    notes += [f"{path}: {told}" for told in shared.told(
        f"1 of its texts stands in {train}, too, and is not trained on",
        f"{{}} of its texts stand in {train}, too, and are not trained on",
    )]  # fmt: skip
    if lacking := [label for label in training.texts if not table.texts.get(label)]:
        notes.append(f"{path}: no text has a label of {reprlib.repr(lacking)}, which {train} has")
    return {label: group for label, group in table.texts.items() if group}, notes


def with_test(data: TextData, count: int | str | None) -> TextData:
    """With so many of its test examples: None for 1000 at most, "all" for all. They are the same for every seed.

    The others are not trained on. Raises ValueError if there are fewer.
    """
    there = len(data.test)
    if count == "all" or (count is None and there <= TEST_EXAMPLES):
        return data
    wanted = TEST_EXAMPLES if count is None else int(count)
    if wanted > there:
        raise ValueError(f"--test-examples: expected at most {there}, those that are held out, or all, got {wanted}")
    if wanted == there:
        return data
    chosen = sorted(random.Random("test").sample(range(there), wanted))
    test = Split([data.test.texts[at] for at in chosen], [data.test.labels[at] for at in chosen])
    note = f"{wanted} of {there} held-out texts are the test (--test-examples, or all)"
    return replace(data, test=test, notes=(*data.notes, note))


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
