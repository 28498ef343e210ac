"""Tables of others: what writers of tables write is read back unchanged; what is wrong is refused with its line, or
counted and said.
"""

from __future__ import annotations

import csv
import io
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from zo_kernels.finetune.data import splits as data
from zo_kernels.finetune.data import tables
from zo_kernels.finetune.data.splits import from_tables, labelled, read_table

WRITERS = {  # quoting, line ends, what comes before the table
    "csv": (csv.QUOTE_MINIMAL, "\r\n", ""),
    "pandas": (csv.QUOTE_MINIMAL, "\n", ""),
    "every field quoted": (csv.QUOTE_ALL, "\n", ""),
    "texts quoted": (csv.QUOTE_NONNUMERIC, "\r\n", ""),
    "a spreadsheet": (csv.QUOTE_MINIMAL, "\r\n", "\ufeff"),
}
PIECES = ['"', '""', ",", "\t", "\n", " ", "  ", "'", "a", "é", "日本", "#", "\\", ";", "\u2028", "\x0b", "say", "1"]


def texts_of(draw: random.Random, pieces: list[str], count: int) -> list[str]:
    """Of all that may be in one, none like another."""
    found: dict[str, str] = {}
    while len(found) < count:
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 8)))
        if text.strip():
            found.setdefault(" ".join(text.split()), text)
    return list(found.values())


def written(rows: list[tuple[object, str]], delimiter: str, quoting: int, ends: str, before: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=ends)
    writer.writerows([("label", "text"), *rows])
    return (before + text.getvalue()).encode()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_what_is_written_is_read_back(suffix: str, delimiter: str, writer: str, tmp_path: Path) -> None:
    draw, path = random.Random(writer), tmp_path / f"t{suffix}"
    # With lines that end with a line feed alone, `csv` before Python 3.13 writes a carriage return without quotes.
    texts = texts_of(draw, PIECES if writer == "pandas" else [*PIECES, "\r"], 300)
    numbered = writer == "texts quoted"
    for some in (texts, *([text] for text in texts[:60])):  # a TSV's quotes are told by one row as by many
        rows = [((1, 2)[at % 2] if numbered else "ab"[at % 2], text) for at, text in enumerate(some)]
        path.write_bytes(written(rows, delimiter, *WRITERS[writer]))
        expected: dict[str, list[str]] = {}
        for label, text in rows:
            expected.setdefault(str(label), []).append(text)
        assert read_table(path) == expected, some[:3]


LITERAL = ['"', "''", 'he said "no"', '"No," he said', '"A" and "B"', '"all of it"', '1"', '"open', 'shut"', '""']


@pytest.mark.parametrize("some", [[text] for text in LITERAL] + [LITERAL], ids=[*map(ascii, LITERAL), "together"])
def test_quotes_of_a_literal_tsv_are_kept(some: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("label\ttext\n" + "".join(f"a\t{text}\n" for text in some), encoding="utf-8")
    found = labelled(path)
    assert found.texts == {"a": some}
    quoted = any('"' in text for text in some)
    assert [note.split(" (")[0] for note in found.notes] == [
        f"{path}: quotes are kept as part of the texts, as is usual in a .tsv file"
    ] * quoted


WRONG = {
    "a surplus field": ("t.csv", b"label,text\nbio,Cell\nmath,Hello, world\n", r", line 3: expected 2 .*double quotes"),
    "a surplus empty field": ("t.csv", b"label,text\nmath,Hello,\n", r", line 2: expected 2 fields.*got 3"),
    "a surplus tab": ("t.tsv", b"label\ttext\na\tb\tc\n", r", line 2: expected 2 fields.*write the table as .csv"),
    "a space before a quote": ("t.csv", b'label,text\na, "b, c"\n', r", line 2: expected 2 .* nothing between"),
    "a field missing": ("t.csv", b"label,text\nmath\n", r", line 2: expected 2 fields.*got 1.*is missing"),
    "no label": ("t.csv", b"label,text\na,b\n ,b c\n", r", line 3: label: expected a text, got ' '"),
    "no text": ("t.tsv", b"label\ttext\na\t\n", r", line 2: text: expected a text, got ''"),
    "an open quote": ("t.csv", b'label,text\na,b\na,"b\na,c\n', r", line 3: the row.* to line 4: .*never closed"),
    "a quote that swallows": ("t.csv", b'label,text\na,"b\na,c\na,"d"\n', r", line 2: the row.* line 4: .* goes on"),
    "a quote too many": ("t.csv", b'label,text\na,"b" c\n', r", line 2: the row.*a quote closes a field that goes on"),
    "escaped quotes": ("t.csv", b'label,text\na,"b \\"c\\""\n', r", line 2: the row.*write the quote inside twice"),
    "quotes of two kinds": ("t.tsv", b'label\ttext\na\t"b ""c"""\na\t"d" e\n', r"t.tsv, line 2: .*, but line 3 is"),
    "an open quote in a quoted TSV": ("t.tsv", b'label\ttext\na\t"b\na\t"c ""d"""\n', r"tsv, line 3: .* line \d is"),
    "NUL": ("t.csv", b"label,text\na,b\na,\0b\n", r", line 3: .* a NUL byte"),
    "UTF-16": ("t.csv", "label,text\na,b\n".encode("utf-16"), r", line 1: .*UTF-8, got UTF-16"),
    "UTF-16 without a mark": ("t.csv", "label,text\na,b\n".encode("utf-16-le"), r", line 1: .*NUL byte.*UTF-16"),
    "Latin-1": ("t.csv", "label,text\na,b\nc,é\n".encode("latin-1"), r", line 3: .* the byte 0xe9: .*iconv"),
    "gzip": ("t.csv", b"\x1f\x8b\x08", r"got gzip"),
    "an overlong field": ("t.csv", b"label,text\na,b\na," + b"x" * 131073, r", line 3: .*more than 131072 characters"),
    "an overlong open quote": ("t.csv", b'label,text\na,"' + b"x\n" * 70000, r", line 2: .*reaches to line .*131072"),
    "a carriage return": ("t.csv", b"label,text\na,b\rc\n", r", line 2: the row.*a carriage return"),
    "no header": ("t.csv", b"math,Hello\nbio,Cell\n", r", line 1: expected a header .*before it: 'label,text'"),
    "a misspelt header": ("t.csv", b"Label, text\na,b\n", r", line 1: .*; rename 'Label' to 'label'"),
    "another delimiter": ("t.csv", b"label;text\na;b\n", r", line 1: .*separated by commas"),
    "a column twice": ("t.csv", b"label,text,text\na,b,c\n", r", line 1: .*every column name once, got text twice"),
    "the header again": ("t.csv", b"label,text\na,b\nlabel,text\n", r", line 3: the header appears again"),
    "empty": ("t.csv", b"\n\n", r"expected a header with the columns label and text, got an empty file"),
    "JSON cut off": ("t.jsonl", b'{"label": "a", "text": "b"}\n{"label": "a"\n', r", line 2: expected a JSON object"),
    "a JSON list": ("t.jsonl", b'["a", "b"]\n', r", line 1: expected a JSON object, got \['a', 'b'\]"),
    "a key missing": ("t.jsonl", b'{"label": "a", "txt": "b"}\n', r", line 1: expected the keys .* named \['text'\]"),
    "a key twice": ("t.jsonl", b'{"label": "a", "text": "b", "text": "c"}\n', r", line 1: .*a key appears twice"),
    "a JSON number": ("t.jsonl", b'{"label": "a", "text": 7}\n', r", line 1: text: expected a text, got 7"),
    "a JSON label": ("t.jsonl", b'{"label": true, "text": "b"}\n', r", line 1: label: expected a text, got True"),
    "a JSON NUL": ("t.jsonl", b'{"label": "a", "text": "b\\u0000"}\n', r", line 1: text: .* a NUL or half"),
    "half a character": ("t.jsonl", b'{"label": "a", "text": "\\ud83d"}\n', r", line 1: text: .* a NUL or half"),
    "no JSON": ("t.jsonl", b"\n", r"expected lines of JSON with the keys label and text, got none"),
    "another suffix": ("t.txt", b"label\ttext\n", r"named .tsv, .csv or .jsonl, got '.txt'"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_with_its_line(wrong: str, tmp_path: Path) -> None:
    name, content, message = WRONG[wrong]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        labelled(tmp_path / name)


def test_a_table_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_bytes(b"label,text\na,b\n")
    monkeypatch.setattr(tables, "_MOST_BYTES", 14)
    with pytest.raises(ValueError, match="expected at most 14 bytes, since the whole file is held in memory, got 15"):
        labelled(tmp_path / "t.csv")


SAID = {
    "nothing": ("t.csv", b"label,text\r\na,b\r\n\r\n\r\n", {"a": ["b"]}, []),
    "old line ends": ("t.csv", b"label,text\ra,b\r", {"a": ["b"]}, []),
    "repeats": (
        "t.csv", b"label,text\na,b\na,b \na, b\n", {"a": ["b"]}, ["2 rows repeat others .*: line 3, like line 2"]
    ),
    "two labels": (
        "t.csv", b"label,text\na,b\nc,b\na,b\nc,d\n", {"a": [], "c": ["d"]},
        ["1 row repeats another .*line 4, like line 2", "1 row has the same text as another but a diff.*line 3"],
    ),
    "blank lines": (
        "t.csv", b"label,text\na,b\n\n \na,c\n\n\n", {"a": ["b", "c"]}, ["2 blank lines were skipped .*: line 3"]
    ),
    "other columns": ("t.csv", b"id,label,text\n1,a,b\n", {"a": ["b"]}, [r"unused columns: \['id'\]"]),
    "line breaks": (
        "t.csv", b'label,text\na,"b\na,c"\n', {"a": ["b\na,c"]},
        ["1 row has line breaks within quotes; is a quote missing.*: lines 2 to 3"],
    ),
    "a quote after a space": ("t.csv", b'label,text\na, "b"\n', {"a": [' "b"']}, ["1 quote after a space .*line 2"]),
    "quotes of csv in a TSV": (
        "t.tsv", b'label\ttext\na\tb\na\t"c ""d"""\n', {"a": ["b", 'c "d"']}, ["fields in quotes .*: line 3"]
    ),
    "labels alike": (
        "t.csv", b"label,text\nMath,b\nmath,c\n", {"Math": ["b"], "math": ["c"]}, ["the labels 'Math' and 'math' d"]
    ),
    "keys that differ": (
        "t.jsonl", b'{"label": 1, "text": "b"}\n\n{"label": 1, "text": "c", "id": 3}\n', {"1": ["b", "c"]},
        [r"the keys of 1 row differ from the first row's \(the first: line 3, \['id'\]", "1 blank line .*: line 2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_must_be_known_is_counted(case: str, tmp_path: Path) -> None:
    name, content, texts, notes = SAID[case]
    (tmp_path / name).write_bytes(content)
    found = labelled(tmp_path / name)
    assert found.texts == texts and len(found.notes) == len(notes), found.notes
    for note, expected in zip(found.notes, notes, strict=True):
        assert re.search(f"^{tmp_path / name}: {expected}", note), note


def table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_bytes(written(list(rows), ",", csv.QUOTE_MINIMAL, "\n", ""))
    return path


def test_what_stands_in_train_and_test_is_counted_and_not_trained_on(tmp_path: Path) -> None:
    train = table(tmp_path / "train.csv", [("ab"[at % 2], f"text {at}") for at in range(40)])
    test = table(tmp_path / "test.csv", [("a", "text 4"), ("b", " text  4 "), ("a", "text  8"), ("a", "new")])
    data = from_tables(train, test, seed=0)
    assert data.test.texts == ["text  8", "new"] and len(data.train) + len(data.dev) == 39
    assert not {"text 8", "new"} & {*data.train.texts, *data.dev.texts}
    said = "\n".join(data.notes)
    assert f"1 of its texts is also in {train} and is not trained on (the first: line 4, there line 10)" in said
    assert f"{test}: no text has a label of ['b'], which {train} has" in said
    table(test, [("a", "new"), ("c", "newer"), ("d", "newest")])
    with pytest.raises(ValueError, match=r"test.csv: .*train.csv has, \['a', 'b'\], got also 'c' \(line 3\), 'd'"):
        from_tables(train, test, seed=0)
    with pytest.raises(ValueError, match=r"label 'a': .*, got 0, without the texts of .*train.csv"):
        from_tables(train, train, seed=0)


def test_a_table_of_one_label_or_exchanged_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected at least two labels, got \['a'\]"):
        from_tables(table(tmp_path / "one.csv", [("a", f"{at}") for at in range(9)]), None, seed=0)
    with pytest.raises(ValueError, match=r"got 9 labels for 9 texts: .* are the columns label and text swapped"):
        from_tables(table(tmp_path / "many.csv", [(f"{at}", f"a {at}") for at in range(9)]), None, seed=0)
    with pytest.raises(ValueError, match=r"got 9 labels for 9 texts: .* are the columns label and text swapped"):
        from_tables(table(tmp_path / "two.csv", [(f"a text {at}", "ab"[at % 2]) for at in range(9)]), None, seed=0)


def test_a_path_with_braces(tmp_path: Path) -> None:
    rows = [("ab"[at % 2], f"text {at}") for at in range(60)]
    path = table(tmp_path / "a{b}{}.csv", rows)
    test = table(tmp_path / "test.csv", rows[:4])
    assert any(f"4 of its texts are also in {path}" in note for note in from_tables(path, test, seed=0).notes)


@pytest.mark.parametrize("separate", [False, True])
def test_the_test_is_capped(separate: bool, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", [("ab"[at % 2], f"text {at}") for at in range(600)])
    test = table(tmp_path / "test.csv", [("ab"[at % 2], f"other {at}") for at in range(120)]) if separate else None
    whole = from_tables(path, test, seed=0, test_examples="all")
    assert len(whole.test) == 120 and from_tables(path, test, seed=0) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TEST_EXAMPLES", 50)
        capped = from_tables(path, test, seed=0)
    assert capped == from_tables(path, test, seed=0, test_examples=50)
    assert len(capped.test) == 50 and set(capped.test.texts) < set(whole.test.texts)
    assert (capped.train, capped.dev) == (whole.train, whole.dev)
    assert "50 of the 120 held-out texts are used as the test (--test-examples changes this)" in capped.notes
    if separate:
        assert from_tables(path, test, seed=1, test_examples=50).test == capped.test
    with pytest.raises(
        ValueError, match="--test-examples: expected all, or at most 120, the number of held-out examples, got 12"
    ):
        from_tables(path, test, seed=0, test_examples=121)
