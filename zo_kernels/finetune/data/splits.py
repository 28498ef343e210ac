"""Labelled texts and their split into training, development and test examples."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zo_kernels.finetune.data import tables

TEST_EXAMPLES = 1000  # at most, unless --test-examples says otherwise
# Shares of a table that are held out if there is no test file. Development examples are evaluated again and again
# during a run, so their number for each label is limited.
_TEST_SHARE, _DEV_SHARE, _MOST_DEV_PER_LABEL = 0.2, 0.1, 50


@dataclass(frozen=True)
class Split:
    """Labelled texts: the label of `texts[i]` is `names[labels[i]]` in the data set."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextData:
    """Three splits that share no text.

    `names` are the readable labels. `notes` tell the user how the splits were made.
    """

    names: tuple[str, ...]
    train: Split
    dev: Split
    test: Split
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """The texts of a table, grouped by label, without repeats.

    Labels are sorted by name; texts keep the order of the file. `lines` maps the `_key` of a text to its line.
    `labels` and `rows` count the labels and the rows of the table, repeats excluded.
    """

    texts: dict[str, list[str]]
    lines: dict[str, int]
    notes: list[str]
    labels: int
    rows: int


def read_table(path: str | Path) -> dict[str, list[str]]:
    """Read a table with the columns label and text: label -> its texts, in order and without repeats.

    Raises the errors of `labelled`.
    """
    return labelled(path).texts


def labelled(path: str | Path) -> Labelled:
    """Read a table with the columns label and text. White space around labels is removed; texts are kept as they are.

    A repeated text is used once. A text that appears under several labels is left out entirely. Two texts are the same
    if they differ only in white space.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is wrong (see `tables.read`), or lacks its label or its text; the message names the line.
    """
    table = tables.read(path, ("label", "text"))
    found: dict[str, tuple[str, str, int]] = {}
    repeats, disagreeing, doubtful, labels = tables.Count(), tables.Count(), set(), set()
    for row, line in zip(table.rows, table.lines, strict=True):
        label, text = row["label"], row["text"]
        if type(label) is int:  # in JSON, labels may be numbers
            label = str(label)
        for name, value in (("label", label), ("text", text)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"{path}, line {line}: {name}: expected a text, got {value!r:.80}: fill it in, or remove the row"
                )
        label, key = label.strip(), _key(text)
        labels.add(label)
        other, _, before = found.setdefault(key, (label, text, line))
        if before != line:
            (repeats if other == label else disagreeing)(f"line {line}, like line {before}")
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
            "1 row has the same text as another but a different label; both are left out",
            "{} rows have the same texts as others but different labels; all of them are left out",
        ),
        _alike(texts),
    ):
        notes += [f"{path}: {told}" for told in line_of]
    lines = {key: line for key, (_, _, line) in found.items()}
    return Labelled(texts, lines, notes, len(labels), len(table.rows) - repeats.times)


def _key(text: str) -> str:
    """The text with its white space normalised: equal for texts that count as the same."""
    return " ".join(text.split())


def _alike(labels: Iterable[str]) -> Iterator[str]:
    """A note for each pair of labels that probably mean the same."""
    plain: dict[str, str] = {}
    for label in labels:
        other = plain.setdefault(_key(label).casefold(), label)
        if other != label:
            yield f"the labels {other!r} and {label!r} differ only in capitals or spaces, and are treated as two labels"


def from_tables(
    train: str | Path, test: str | Path | None, *, seed: int, test_examples: int | str | None = None
) -> TextData:
    """Make a data set from a training table and a test table, or from one table with a fifth held out as the test.

    Texts that appear in both tables are removed from the training table.

    Args:
        train, test: paths of the tables; None for no test table.
        seed: draws the development examples and, without a test table, the test.
        test_examples: as for `with_test`.

    Raises ValueError if there are fewer than two labels, the test table has a label that the training table lacks, or
    a label has too few texts to be split.
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
            f"{path}: expected a few labels with many texts each, got {table.labels} labels for {table.rows} texts: "
            f"{some}"
            "; are the columns label and text swapped?"
        )


def _test_of(path: str | Path, train: str | Path, training: Labelled) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of a test table, and notes on them. Raises ValueError if it does not fit to the training table."""
    table = labelled(path)
    if unknown := [label for label in table.texts if label not in training.texts]:
        known = reprlib.repr(list(training.texts))
        firsts = {label: table.texts[label][0] for label in unknown if table.texts[label]}
        some = [f"{label!r} (line {table.lines[_key(text)]})" for label, text in firsts.items()]
        raise ValueError(
            f"{path}: expected only labels that {train} has, {known}, got also {', '.join(some[:3]) or unknown}"
            f"{f' and {len(some) - 3} others' if len(some) > 3 else ''}"
        )
    if not any(table.texts.values()):
        raise ValueError(f"{path}: expected at least one example, got none")
    notes, shared = [*table.notes], tables.Count()
    for group in table.texts.values():
        for text in group:
            if (line := training.lines.get(_key(text))) is not None:
                shared(f"line {table.lines[_key(text)]}, there line {line}")
    notes += [f"{path}: {told}" for told in shared.told(
        f"1 of its texts is also in {train} and is not trained on",
        f"{{}} of its texts are also in {train} and are not trained on",
    )]  # fmt: skip
    if lacking := [label for label in training.texts if not table.texts.get(label)]:
        notes.append(f"{path}: no text has a label of {reprlib.repr(lacking)}, which {train} has")
    return {label: group for label, group in table.texts.items() if group}, notes


def with_test(data: TextData, count: int | str | None) -> TextData:
    """Keep only `count` of the test examples: None keeps at most 1000, "all" keeps all.

    The choice is the same for every seed. The other test examples are not used at all. Raises ValueError if there are
    fewer than `count`.
    """
    there = len(data.test)
    if count == "all" or (count is None and there <= TEST_EXAMPLES):
        return data
    wanted = TEST_EXAMPLES if count is None else int(count)
    if wanted > there:
        raise ValueError(
            f"--test-examples: expected all, or at most {there}, the number of held-out examples, got {wanted}"
        )
    if wanted == there:
        return data
    chosen = sorted(random.Random("test").sample(range(there), wanted))
    test = Split([data.test.texts[at] for at in chosen], [data.test.labels[at] for at in chosen])
    note = f"{wanted} of the {there} held-out texts are used as the test (--test-examples changes this)"
    return replace(data, test=test, notes=(*data.notes, note))


def split(
    texts: Mapping[str, Sequence[str]],
    *,
    seed: int,
    held_out: Mapping[str, tuple[int, int]],
    most_train: int | None = None,
) -> TextData:
    """Shuffle the texts of each label by `seed`, hold out `(dev, test)` of them, and train on the rest.

    Labels are shuffled one by one, so the split of a label does not depend on the other labels.

    Args:
        texts: label -> texts.
        seed: of the shuffle.
        held_out: label -> the numbers of development and test texts.
        most_train: the largest number of training texts for each label.

    Raises ValueError if a label has nothing left to train on.
    """
    parts: dict[str, tuple[Sequence[str], ...]] = {}
    for label, group in texts.items():
        n_dev, n_test = held_out[label]
        if len(group) <= n_dev + n_test:
            raise ValueError(
                f"label {label!r}: expected more than {n_dev + n_test} texts ({n_test} for the test, {n_dev} for "
                f"development, the rest for training), got {len(group)}"
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
