"""The documents show what the committed rows say, link to what is there, and hold code that is Python."""

import ast
import importlib
import re
from pathlib import Path

import messages
import pytest

from benchmarks.__main__ import main
from benchmarks.bench.document import ROOT, tables, updated
from benchmarks.gpu.tables import TABLES as GPU_TABLES

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OF_GPUS = sorted(ROOT.glob("docs/gpu/*/README.md"))
EVIDENCE, PERFORMANCE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "performance.md"


def test_the_tables_of_the_evidence_are_those_of_the_committed_rows(capsys):
    text = EVIDENCE.read_text()
    assert main(["evidence", "--check", str(EVIDENCE), str(PERFORMANCE), *map(str, OF_GPUS)]) == 0
    marked = re.findall(r"<!-- table (\S+) ", text + PERFORMANCE.read_text())
    assert set(marked) == set(tables()) - set(GPU_TABLES)
    changed = re.sub(r"(\| zo2 \w+ \| )\d", r"\g<1>9", text)
    assert changed != text and updated(changed) == text


def test_a_table_out_of_date_is_told_and_written(tmp_path, capsys):
    document = tmp_path / "some.md"
    mark = "<!-- table peers-loss of docs/results/peers.csv, docs/results/peers-loss.csv -->"
    document.write_text(f"{mark}\nXYZZY\n<!-- end -->\nkept\n")
    assert main(["evidence", "--check", str(document)]) == 1
    assert "out of date" in capsys.readouterr().out and "XYZZY" in document.read_text()
    assert main(["evidence", str(document)]) == 0
    text = document.read_text()
    assert "XYZZY" not in text and "MeZO's loop" in text and text.endswith("<!-- end -->\nkept\n")
    assert main(["evidence", "--check", str(document)]) == 0


@pytest.mark.parametrize(
    "mark, told",
    [
        ("table peers-los of docs/results/peers.csv", "expected a table of signs-passes"),
        ("table lezo of docs/results/peers.csv", "no rows for the table lezo"),
        ("table lezo of docs/results/none.csv", "there is no file"),
        ("a comment", "expected marks such as"),
    ],
)
def test_a_mark_that_asks_for_nothing_is_an_error(mark, told, tmp_path, capsys):
    document = tmp_path / "some.md"
    document.write_text(f"<!-- {mark} -->\n<!-- end -->\n")
    assert main(["evidence", str(document)]) == 2 and told in capsys.readouterr().err


def test_pipes_in_cells_do_not_part_them():
    text = updated("<!-- table moments of docs/results/randomness-moments.csv -->\n<!-- end -->\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1 and r"\|z\| > 6" in text


@pytest.mark.parametrize("document", [*DOCUMENTS, *OF_GPUS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_is_python(document):
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        ast.parse(f"{{{block}}}" if block.startswith('"') else block)  # an entry of a dict is no statement


def test_documents_are_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name}" in index, path.name


def test_pages_are_in_the_site():
    nav = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(nav) == sorted([*pages, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])


@pytest.mark.parametrize("module", ["zo_kernels", "zo_kernels.integrations.transformers", "zo_kernels.finetune"])
def test_public_names_are_in_the_reference(module):
    told = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert {name for name in told if name.rpartition(".")[0] == module} == public


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_a_newcomer_is_sent_to_are_there(document):
    for path in re.findall(
        r"`((?:zo_kernels|csrc|tests|benchmarks|docs|examples)/[\w./]*)`", (ROOT / document).read_text()
    ):
        assert (ROOT / path).exists() or path == "docs/gpu/", path


def test_the_readme_is_a_screen_and_its_measured_cells_are_those_of_the_evidence():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 120
    rows = [line.split(" | ") for line in EVIDENCE.read_text().splitlines() if line.startswith("| opt-125m, 1 × 32 | ")]
    told = {
        package: (row[4], row[6])
        for row in rows
        for package in ("MeZO 5", "zo_kernels, in")
        if row[1].startswith(package)
    }
    assert "{} times ours, {} MiB beside the weights".format(*told["MeZO 5"]) in readme
    assert "in the forward {}, {} MiB".format(*told["zo_kernels, in"]) in readme


def test_figures_and_rows_are_spoken_of():
    text = "".join(path.read_text() for path in DOCUMENTS)
    for path in (*Path(ROOT, "docs", "figures").iterdir(), *Path(ROOT, "docs", "results").iterdir()):
        assert path.name in text, path.name


def test_messages_that_are_quoted_are_ours():
    """So that who looks for a message finds its row."""
    modules = messages.of_package(ROOT / "zo_kernels")
    quotes = messages.quoted((ROOT / "docs" / "troubleshooting.md").read_text())
    unknown = [quote for quote in quotes if not messages.is_said(quote, modules)]
    assert len(quotes) > 40 and not unknown, unknown


@pytest.mark.parametrize(
    "quote, is_said",
    [
        ("expected a … of 3", True),
        ("expected a dog", False),
        ("a head, got …; look", True),
        ("expected a cat of 3 got", False),
        ("…", False),
    ],
)
def test_a_quote_is_compared_with_what_the_source_says(quote, is_said):
    source = 'f"expected a {kind} " "of 3" "; look"\nx = "a head, got "'
    assert messages.is_said(quote, [messages.of_source(source)]) == is_said
    table = f"| you see | we say |\n|---|---|\n| `no` | `{quote}` |\n\n| a | b |\n|---|---|\n| a | `no` |\n"
    assert messages.quoted(table) == [quote]
