"""Read tables that users bring: .csv, .tsv and .jsonl.

A table is read whole, or refused with a message that names the wrong line. Nothing in it is dropped silently.
"""

from __future__ import annotations

import csv
import io
import json
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MOST_BYTES = 1 << 31  # the whole file is held in memory
# A field of a quoted TSV: every quote stands where csv and pandas would put it.
_FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|[^"\t\n]*)(\t|\r?\n|\r?\Z)')
_NUMBER = re.compile(r"[-+.\deE]*")
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip (a spreadsheet?)"}


@dataclass
class Table:
    """The rows of a file (column -> value), the line where each begins, and notes for the user."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Count:
    """Counts how often something was found, and remembers the first place."""

    def __init__(self) -> None:
        self.times = 0
        self.first = ""

    def __call__(self, where: str) -> None:
        self.times += 1
        self.first = self.first or where

    def told(self, one: str, many: str) -> Iterator[str]:
        """One line of text if anything was counted. `{}` in `many` stands for the number."""
        if self.times:
            yield f"{one if self.times == 1 else many.replace('{}', str(self.times), 1)} (the first: {self.first})"


def read(path: str | Path, needed: Collection[str]) -> Table:
    """Read a table that has at least the columns `needed`.

    A .csv file uses the usual quoting. A .tsv file uses it too if it was written that way (see `_quoted`); otherwise
    quotes are part of its texts. A .jsonl file has one object in each line. Blank lines are skipped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the suffix is another one, or a line is wrong; the message names the line and says what to do.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (*_DELIMITERS, ".jsonl"):
        raise ValueError(f"{path}: expected a file named .tsv, .csv or .jsonl, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'expected a file' if path.exists() else 'no such file'}")
    text = _text(path)
    table = _objects(path, text, needed) if kind == ".jsonl" else _fields(path, text, needed, _DELIMITERS[kind])
    if unused := [name for name in table.columns if name not in needed]:
        table.notes.append(f"unused columns: {reprlib.repr(unused)}")
    table.notes = [f"{path}: {note}" for note in table.notes]
    return table


def _text(path: Path) -> str:
    """The text without a byte order mark. Lines end with a line feed, perhaps after a carriage return."""
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(
            f"{path}: expected at most {_MOST_BYTES} bytes, since the whole file is held in memory, got {size}"
        )
    data = path.read_bytes()
    for mark, name in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{path}, line 1: expected a table in UTF-8, got {name}: save it as UTF-8")
    if (at := data.find(b"\0")) >= 0:
        raise ValueError(
            f"{path}, line {_line(data, at)}: expected a table in UTF-8, got a NUL byte: the file is damaged, or its "
            "encoding is another one (UTF-16?): save it as UTF-8"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {_line(data, error.start)}: expected a table in UTF-8, got the byte "
            f"0x{data[error.start]:02x}: if it is in Latin-1, convert it with iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    return text if "\n" in text else text.replace("\r", "\n")


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _objects(path: Path, text: str, needed: Collection[str]) -> Table:
    table, blank, others = Table(path, ()), Count(), Count()
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if not line.strip():
            blank(f"line {number}")
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {reprlib.repr(line)}: {error}"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {reprlib.repr(row)}")
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"{path}, line {number}: expected the keys {_listed(needed)}, got none named {missing}")
        if not table.columns:
            table.columns = tuple(row)
        elif row.keys() != set(table.columns):
            others(f"line {number}, {sorted(row.keys() ^ set(table.columns))}")
        if "\\u" in line and (wrong := [name for name in needed if _is_no_text(row[name])]):
            raise ValueError(
                f"{path}, line {number}: {wrong[0]}: expected a text, got {row[wrong[0]]!r:.80}, which contains a NUL "
                "or half a character: remove it"
            )
        table.rows.append(row)
        table.lines.append(number)
    if not table.rows:
        raise ValueError(f"{path}: expected lines of JSON with the keys {_listed(needed)}, got none")
    table.notes += others.told(
        "the keys of 1 row differ from the first row's", "the keys of {} rows differ from the first row's"
    )
    table.notes += _blank(blank, text)
    return table


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key appears twice")
    return values


def _is_no_text(value: Any) -> bool:
    """Whether a text has characters that JSON can escape but no tokenizer can read."""
    return isinstance(value, str) and re.search("[\0\ud800-\udfff]", value) is not None


def _fields(path: Path, text: str, needed: Collection[str], delimiter: str) -> Table:
    quoted, notes = (True, []) if delimiter == "," else _quoted(path, text)
    blank, broken, spaced = Count(), Count(), Count()
    records = _records(path, text, delimiter, quoted)
    columns: tuple[str, ...] | None = None
    table = Table(path, ())
    after_spaces = quoted and f'{delimiter} "' in text
    for line, last, values in records:
        if not values or (len(values) == 1 and not values[0].strip()):
            blank(f"line {line}")
        elif columns is None:
            columns = table.columns = _header(path, line, tuple(values), needed, delimiter)
        elif tuple(values) == columns:
            raise ValueError(
                f"{path}, line {line}: the header appears again: are there two tables in one file? Remove this line"
            )
        elif len(values) != len(columns):
            raise ValueError(
                f"{path}, line {line}: expected {len(columns)} fields, as the header has ({_listed(columns)}), got "
                f"{len(values)}: {reprlib.repr(values)}; {_cure(len(values) > len(columns), delimiter, quoted)}"
            )
        else:
            if last > line:
                broken(f"lines {line} to {last}")
            if after_spaces and any(value[:1] == " " and value.lstrip(" ")[:1] == '"' for value in values):
                spaced(f"line {line}")
            table.rows.append(dict(zip(columns, values, strict=True)))
            table.lines.append(line)
    if columns is None:
        raise ValueError(f"{path}: expected a header with the columns {_listed(needed)}, got an empty file")
    table.notes += notes
    table.notes += broken.told(
        "1 row has line breaks within quotes; is a quote missing?",
        "{} rows have line breaks within quotes; is a quote missing?",
    )
    table.notes += spaced.told(
        "1 quote after a space is part of the text; remove the space if it should quote the field",
        "{} quotes after a space are part of the texts; remove the spaces if they should quote the fields",
    )
    table.notes += _blank(blank, text)
    return table


def _records(path: Path, text: str, delimiter: str, quoted: bool) -> Iterator[tuple[int, int, list[str]]]:
    """Yield each record: its first line, its last line, its fields."""
    # Only a line feed ends a line: a carriage return in the middle of a line is an error, not a new row.
    lines = io.StringIO(text, newline="\n")
    if quoted:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)
    before = 0
    try:
        for values in reader:
            yield before + 1, reader.line_num, values
            before = reader.line_num
    except csv.Error as error:
        reached = "" if reader.line_num == before + 1 else f", and reaches to line {reader.line_num}"
        raise ValueError(f"{path}, line {before + 1}: the row that begins here{reached}: {_told(error)}") from error


def _told(error: csv.Error) -> str:
    reason = str(error)
    if "unexpected end" in reason:
        return "a quote is opened and never closed: close it; inside a quoted field, write a quote twice"
    if "field limit" in reason:
        return (
            f"a field of more than {csv.field_size_limit()} characters: is a quote opened and never closed? Shorten "
            "texts that are really this long"
        )
    if "expected after" in reason:
        return (
            "a quote closes a field that goes on: put a field with a quote in it into quotes, and write the quote "
            "inside twice"
        )
    if "new-line character" in reason:
        return "a carriage return without a line feed, outside quotes: quote the field, or remove the carriage return"
    return reason


def _cure(more: bool, delimiter: str, quoted: bool) -> str:
    name = {",": "comma", "\t": "tab"}[delimiter]
    if not more:
        return "a field is missing, or an unquoted field contains a line break"
    if quoted:
        return f"put a field that contains a {name} in double quotes, with nothing between the {name} and the quote"
    return f"a field contains a {name}: remove it, or write the table as .csv"


def _header(
    path: Path, line: int, columns: tuple[str, ...], needed: Collection[str], delimiter: str
) -> tuple[str, ...]:
    missing = [name for name in needed if name not in columns]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if not missing and not twice:
        return columns
    if twice:
        raise ValueError(f"{path}, line {line}: expected every column name once, got {_listed(twice)} twice")
    plain = {name.strip().lower(): name for name in columns}
    hint = next((f"; rename {plain[name]!r} to {name!r}" for name in missing if name in plain), "")
    others = [name for name in columns if name not in needed]
    if not hint and len(missing) == 1 < len(needed) and others:
        hint = f"; rename {others[0]!r} to {missing[0]!r}"
    if not hint and len(columns) == 1:
        hint = f"; the fields of a {path.suffix} are separated by {'tabs' if delimiter == chr(9) else 'commas'}"
    first = "" if hint else f"; if this line is already an example, put a header before it: {delimiter.join(needed)!r}"
    raise ValueError(
        f"{path}, line {line}: expected a header with the columns {_listed(needed)}, got "
        f"{reprlib.repr(list(columns))}{hint or first}"
    )


def _quoted(path: Path, text: str) -> tuple[bool, list[str]]:
    """Whether a TSV file uses quotes as a CSV file does, and a note about it.

    Data sets are written both ways. `csv` and pandas put quotes around every field, or around a field that contains a
    quote, a tab or a line break, and double the quotes inside. Others, such as GLUE, write quotes as they stand in the
    text. A file counts as quoted if every quote is where `csv` would put it, and at least one is where only `csv`
    would.

    Raises ValueError if some lines are written one way and some the other.
    """
    if '"' not in text:
        return False, []
    at, literal, sure, first, bare = 0, 0, 0, 0, False
    while at < len(text):
        match = _FIELD.match(text, at)
        if match is None:
            literal = text.count("\n", 0, text.index('"', at)) + 1
            break
        found = match[1]
        if found.startswith('"'):
            if not first:
                first = text.count("\n", 0, at) + 1
            if not sure and re.search('""|[\t\r\n]', found[1:-1]):
                sure = text.count("\n", 0, at) + 1
        elif _NUMBER.fullmatch(found.strip()) is None:
            bare = True
        at = match.end()
    if not literal and (sure or not bare):
        return True, [
            f"fields in quotes are read without the quotes, as csv and pandas write them (the first: line {first})"
        ]
    literal = literal or first
    if (other := _doubled(text)) is not None:
        raise ValueError(
            f"{path}, line {other}: this line is quoted as csv and pandas quote (a quote inside is written twice), but "
            f"line {literal} is not: correct the quotes, or write the table as .csv with every field quoted"
        )
    return False, [
        f"quotes are kept as part of the texts, as is usual in a .tsv file (the first: line {first or literal})"
    ]


def _doubled(text: str) -> int | None:
    """The first line with a quoted field that has a doubled quote inside."""
    for number, line in enumerate(text.split("\n"), 1):
        if '""' in line:
            for one in line.rstrip("\r").split("\t"):
                inner = one[1:-1]
                if one[:1] == one[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
                    return number
    return None


def _blank(blank: Count, text: str) -> Iterable[str]:
    """A note on blank lines between rows. Blank lines at the end of a file are fine."""
    trailing = len(re.findall("\n", text[len(text.rstrip()) :])) - 1
    between = blank.times - max(trailing, 0)
    if between > 0:
        blank.times = between
        yield from blank.told("1 blank line was skipped", "{} blank lines were skipped")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return (" and " if len(names) < 3 else ", ").join(names)
