"""Load the data set of a task from the hub or from files, and sample training, development and test examples."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from zo_kernels.finetune.config import ALL
from zo_kernels.finetune.data import tables
from zo_kernels.finetune.data.splits import TEST_EXAMPLES
from zo_kernels.finetune.tasks import Row, Task

T = TypeVar("T")

_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_READ_HERE = (".jsonl", ".csv")  # line by line, so that messages can name the wrong line
_TRAIN_EXAMPLES = 1000


@dataclass(frozen=True)
class Example:
    """One row: the fields for the templates, the index of its label, and the right answers."""

    fields: dict[str, str]
    label: int
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskData:
    """Three splits that share no row. `notes` tell the user what is special about them."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The rows of a split, and a name for each, for messages."""

    columns: Sequence[str]
    rows: Any  # a sequence of mappings
    where: Callable[[int], str]
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)


def load_task(
    name: str,
    task: Task,
    folder: str | None,
    seed: int,
    train: int | None,
    dev: int | None,
    test: int | str | None,
) -> TaskData:
    """Load the examples of a task.

    Training and development examples are drawn from the training split, test examples from the validation split.

    Args:
        name: of the task, for messages.
        task: the task.
        folder: has the files train and validation (.parquet, .json, .jsonl or .csv); None for the hub.
        seed: draws training and development examples. Test examples are the same for every seed.
        train: number of training examples; None for 1000, or all that are left.
        dev: number of development examples; None for the number of the task, at most half of the split.
        test: number of test examples, or "all"; None for 1000, or all if there are fewer.

    Raises:
        ValueError: datasets is not installed, the data cannot be loaded, a column is missing, there are too few rows,
            or a drawn row is wrong.
    """
    splits = _load(name, task, folder)
    for split in splits.values():
        if missing := [column for column in task.columns if column not in split.columns]:
            raise ValueError(f"--task {name}: expected the columns {list(task.columns)}, got none named {missing}")
    n_dev = _count("dev_examples", dev, task.dev_examples, len(splits["train"]), at_most=len(splits["train"]) // 2)
    n_train = _count("train_examples", train, _TRAIN_EXAMPLES, len(splits["train"]) - n_dev)
    wanted = len(splits["validation"]) if test == ALL else None if test is None else int(test)
    n_test = _count("test_examples", wanted, TEST_EXAMPLES, len(splits["validation"]))
    order = random.Random(f"{seed} train").sample(range(len(splits["train"])), n_dev + n_train)
    tests = random.Random("test").sample(range(len(splits["validation"])), n_test)

    empty = tables.Count()

    def drawn(split: str, indices: Sequence[int]) -> list[Example]:
        there, examples = splits[split], []
        for index in indices:
            where = there.where(index)
            examples.append(_example(f"--task {name}, {where}", task, there.rows[index]))
            if lacking := [field for field, value in examples[-1].fields.items() if not value]:
                empty(f"{where}, {lacking[0]}")
        return examples

    data = TaskData(drawn("train", order[n_dev:]), drawn("train", order[:n_dev]), drawn("validation", tests))
    read = [note for split in splits.values() for note in split.notes]
    lacking = empty.told("1 example has an empty text", "{} examples have an empty text")
    return replace(data, notes=(*read, *lacking, *_leaks(data), *_lopsided(task, data)))


def _leaks(data: TaskData) -> Iterator[str]:
    """Notes on examples that are in several splits. They are kept, since data sets are used as published."""
    known = {repr(example.fields) for example in data.train}
    for split, examples in (("development", data.dev), ("test", data.test)):
        if shared := sum(repr(example.fields) in known for example in examples):
            yield f"{shared} of the {len(examples)} {split} examples are also among the training examples"


def _lopsided(task: Task, data: TaskData) -> Iterator[str]:
    if len(task.causal.words) == 1:  # answers that are generated
        return
    for split, examples in (("training", data.train), ("development", data.dev), ("test", data.test)):
        if len(labels := {example.label for example in examples}) == 1:
            word = task.causal.names[labels.pop()]
            yield f"all {len(examples)} {split} examples have the same label, {word}: their score says little"


def fields_of(where: str, task: Task, row: Row) -> dict[str, str]:
    """The fields of a row that the templates of the task name.

    Raises TypeError if `row` is not a mapping, ValueError if a column is missing or wrong.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected a mapping of the columns {', '.join(task.columns)}, got {row!r}")
    return _of_row(where, task, row, task.fields)


def _of_row(where: str, task: Task, row: Row, what: Callable[[Row], T]) -> T:
    try:
        return what(row)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        got = reprlib.repr(dict(row))
        raise ValueError(f"{where}: expected a row with {', '.join(task.columns)}, got {got}: {error!r}") from error


def _load(name: str, task: Task, folder: str | None) -> dict[str, Rows]:
    files: dict[str, str] | None = None
    source: Sequence[str | None] = task.hub
    if folder is not None:
        files = {split: str(_file(Path(folder), split)) for split in ("train", "validation")}
        suffixes = {Path(file).suffix.lower() for file in files.values()}
        kinds = {_KINDS[suffix] for suffix in suffixes}
        if len(kinds) != 1:
            raise ValueError(f"--task-data: expected train and validation files of one kind, got {sorted(kinds)}")
        if suffixes <= set(_READ_HERE):
            return {split: _read(file, task) for split, file in files.items()}
        source = (kinds.pop(), None)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            "--task: expected the package datasets to be installed: pip install 'zo_kernels[tasks]'"
        ) from error
    try:
        loaded = datasets.load_dataset(*source, data_files=files)
        return {split: _rows(loaded[split], split, files) for split in ("train", "validation")}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = " (--task-data FOLDER reads files instead)" if folder is None else ""
        got = repr(error.__cause__ or error)
        raise ValueError(f"--task {name}: expected to load {folder or task.hub[0]}{hint}, got {got}") from error


def _read(file: str, task: Task) -> Rows:
    table = tables.read(file, task.columns)
    return Rows(table.columns, table.rows, lambda index: f"{file}, line {table.lines[index]}", table.notes)


def _rows(split: Any, name: str, files: Mapping[str, str] | None) -> Rows:
    file = name if files is None else files[name]
    return Rows(split.column_names, split, lambda index: f"{file}, row {index + 1}")


def _file(folder: Path, split: str) -> Path:
    found = [path for suffix in _KINDS if (path := folder / f"{split}{suffix}").is_file() and path.stat().st_size]
    if len(found) != 1:
        names, got = "|".join(_KINDS), [path.name for path in found]
        raise ValueError(f"--task-data: expected one file {split}{names}, not empty, in {folder}, got {got}")
    return found[0]


def _count(name: str, wanted: int | None, default: int, there: int, at_most: int | None = None) -> int:
    if wanted is None:
        wanted = min(default, there if at_most is None else at_most)
    if not 0 < wanted <= there:
        option = "--" + name.replace("_", "-")
        raise ValueError(f"{option}: expected 1 to {there}, the number of rows that are left, got {wanted}")
    return wanted


def _example(where: str, task: Task, row: Row) -> Example:
    words = len(task.causal.words)
    fields, label = fields_of(where, task, row), _of_row(where, task, row, task.label)
    if not 0 <= label < words:
        raise ValueError(f"{where}: expected labels from 0 to {words - 1}, got {label}")
    if task.references is None:
        return Example(fields, label)
    references = _of_row(where, task, row, task.references)
    if not references:
        raise ValueError(f"{where}: expected an answer in every row, got none in {reprlib.repr(dict(row))}")
    return Example(fields, label, references)
