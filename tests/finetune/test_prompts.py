"""The tasks' data and prompts: what is rendered, what is scored, what is cut."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

for module in ("transformers", "datasets"):
    pytest.importorskip(module)

from tiny_tasks import byte_tokenizer, row_of, tiny_bert, write_rows  # noqa: E402

from zo_kernels.finetune import tasks  # noqa: E402
from zo_kernels.finetune.prompts import answers  # noqa: E402
from zo_kernels.finetune.prompts.render import CausalPrompts, MaskedPrompts, single_tokens  # noqa: E402
from zo_kernels.finetune.prompts.task_data import TaskData, load_task  # noqa: E402
from zo_kernels.finetune.tasks import TASKS  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a gem . "},
    "rte": {"premise": "It rained. Hard.", "hypothesis": "The street is wet."},
    "cb": {"premise": "It rained!", "hypothesis": "it was wet"},
    "boolq": {"passage": "Ice floats.", "question": "does ice float"},
    "wic": {"word": "bank", "sentence1": "The bank was closed.", "sentence2": "They sat on the bank."},
    "copa": {"premise": "The lamp broke.", "choice1": "I fell.", "choice2": "The cat ran.", "question": "cause"},
    "squad": {
        "title": "Ice", "context": "Ice floats.", "question": "What floats? ", "answers": {"text": ["Ice", "ice"]},
    },
}  # fmt: skip
CAUSAL = {
    "sst2": ("a gem . It was", [" terrible", " great"]),
    "rte": (
        'It rained. Hard.\nDoes this mean that "The street is wet." is true? Yes or No?\n',
        ["Yes", "No"],
    ),
    "cb": ('Suppose It rained! Can we infer that "it was wet"? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"]),
    "boolq": ("Ice floats. Does ice float?", [" No", " Yes"]),
    "wic": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank was closed.\nThey sat on the bank.\n",
        ["No", "Yes"],
    ),
    "copa": ("The lamp broke because", [" I fell.", " the cat ran."]),
    "squad": ("Title: Ice\nContext: Ice floats.\nQuestion: What floats?\nAnswer:", [" Ice\n"]),
}
MASKED = {
    "sst2": ("a gem . It was <mask>.", ("terrible", "great")),
    "rte": ("It rained. Hard? <mask>, the street is wet.", ("Yes", "No")),
    "cb": ("It rained? <mask>, it was wet", ("Yes", "No", "Maybe")),
    "boolq": ("Ice floats. Question: Does ice float? Answer: <mask>.", ("No", "Yes")),
    "wic": (
        '"The bank was closed." / "They sat on the bank." Similar sense of "bank"? <mask>.',
        ("No", "Yes"),
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), before="<s>", after="</s>")


# Rendering


@pytest.mark.parametrize("task", TASKS)
def test_causal_prompts(task: str, tokenizer: Any) -> None:
    prompt = CausalPrompts(tokenizer, TASKS[task].causal, 512)(TASKS[task].fields(ROWS[task]))
    text, candidates = CAUSAL[task]
    assert tokenizer.decode(prompt.prompt) == "<s>" + text
    assert [tokenizer.decode(row) for row in prompt.rows] == ["<s>" + text + candidate for candidate in candidates]
    scored = [tokenizer.decode(row[-n:]) for row, n in zip(prompt.rows, prompt.answers, strict=True)]
    assert scored == candidates and not prompt.cut


@pytest.mark.parametrize("task", MASKED)
def test_masked_prompts(task: str, tokenizer: Any) -> None:
    template = TASKS[task].masked
    assert template is not None
    prompt = MaskedPrompts(tokenizer, template, 512)(TASKS[task].fields(ROWS[task]))
    # The mask takes the space before it for itself.
    assert tokenizer.decode(prompt.ids) == "<s>" + MASKED[task][0].replace(" <mask>", "<mask>") + "</s>"
    assert tokenizer.convert_ids_to_tokens(prompt.ids[prompt.mask]) == "<mask>" and template.words == MASKED[task][1]


def test_tasks_without_masked_prompts() -> None:
    assert (
        {name for name, task in TASKS.items() if task.masked is None} == {"copa", "squad"} == set(TASKS) - set(MASKED)
    )


def test_effects_and_other_questions() -> None:
    assert TASKS["copa"].fields({**ROWS["copa"], "question": "effect"})["connective"] == "so"
    with pytest.raises(ValueError, match="expected cause or effect, got 'why'"):
        TASKS["copa"].fields({**ROWS["copa"], "question": "why"})


def test_a_word_that_merges_with_the_prompt_is_scored_whole() -> None:
    class Merging:
        """One token a letter, but for "sc"."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text.replace("sc", "*")]}

    template = TASKS["sst2"].causal
    prompt = CausalPrompts(Merging(), type(template)("{sentence}", ("care", "b"), "sentence", ""), 9)(
        {"sentence": "as"}
    )
    assert prompt.rows == [[ord(letter) for letter in "a*are"], [ord(letter) for letter in "asb"]]
    assert prompt.answers == [4, 1]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_only_the_long_part_is_cut(kind: str, tokenizer: Any) -> None:
    """To the limit exactly: one token more is not cut."""
    fields = TASKS["boolq"].fields({**ROWS["boolq"], "passage": "red green blue " * 20})
    template = TASKS["boolq"].causal if kind == "causal" else TASKS["boolq"].masked
    assert template is not None
    make = CausalPrompts if kind == "causal" else MaskedPrompts

    def rendered(limit: int) -> tuple[list[list[int]], bool]:
        prompt = make(tokenizer, template, limit)(fields)
        return getattr(prompt, "rows", None) or [prompt.ids], prompt.cut

    rows, cut = rendered(512)
    longest = max(map(len, rows))
    assert not cut and rendered(longest) == (rows, False)
    shorter, cut = rendered(56)
    assert cut and 52 <= max(map(len, shorter)) <= 56
    for row, whole in zip(shorter, rows, strict=True):
        assert row[-8:] == whole[-8:] and row[:20] == whole[:20]
    with pytest.raises(ValueError, match=r"--max-tokens: expected at least \d+, .* without its passage, got 12"):
        rendered(12)


def test_room_for_the_answer_is_kept(tokenizer: Any) -> None:
    prompt = CausalPrompts(tokenizer, TASKS["squad"].causal, 80, room=20)(
        TASKS["squad"].fields({**ROWS["squad"], "context": "Ice floats. " * 20})
    )
    assert prompt.cut and 54 <= len(prompt.prompt) <= 60


def test_a_text_with_the_mask_in_it_is_refused(tokenizer: Any) -> None:
    template = TASKS["sst2"].masked
    assert template is not None
    with pytest.raises(ValueError, match=r"without the model's mask <mask>, got .*a <mask> film"):
        MaskedPrompts(tokenizer, template, 99)({"sentence": "a <mask> film"})


def test_label_words_are_single_tokens(tokenizer: Any, tmp_path: Path) -> None:
    assert [tokenizer.decode([token]) for token in single_tokens(tokenizer, ("great", "No"))] == [" great", " No"]
    with pytest.raises(ValueError, match=r"one token for the label word 'unheard', got \["):
        single_tokens(tokenizer, ("great", "unheard"))
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(tiny_bert(tmp_path))
    with pytest.raises(ValueError, match=r"label word 'Maybe', got \['\[UNK\]'\]"):
        single_tokens(words, ("Yes", "No", "Maybe"))


# docs/tasks.md


@pytest.mark.parametrize("name", TASKS)
def test_the_page_has_the_prompts_as_they_are(name: str) -> None:
    task, page = TASKS[name], PAGE.read_text(encoding="utf-8")
    row, *masked = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    hub = ", ".join(filter(None, task.hub))
    words = ", ".join(word.strip(" ") for word in task.causal.words)
    assert row.startswith(f"| `{name}` | {hub} | {task.causal.prompt} | {words} | ".replace("\n", "⏎"))
    prompts = [] if task.masked is None else [task.masked.prompt.format_map(Named(mask="[MASK]"))]
    assert [line.split(" | ")[1] for line in masked] == prompts


class Named(dict[str, str]):
    """Fields that stand for themselves."""

    def __missing__(self, field: str) -> str:
        return "{" + field + "}"


def test_the_example_of_another_task_is_one(tokenizer: Any) -> None:
    example = PAGE.read_text(encoding="utf-8").split("```python\n")[-1].split("```")[0]
    task = eval("{" + example + "}", vars(tasks))["mrpc"]
    fields = task.fields({"sentence1": "It rains. ", "sentence2": "Rain falls."})
    prompt = CausalPrompts(tokenizer, task.causal, 99)(fields)
    assert tokenizer.decode(prompt.rows[1]) == "<s>It rains.\nSame meaning: Rain falls.? Yes or No?\nYes"
    assert MaskedPrompts(tokenizer, task.masked, 99)(fields).mask > 0


# Data


def load(task: str, folder: Path | None, **counts: Any) -> TaskData:
    wanted = {"seed": 0, "train": None, "dev": None, "test": None} | counts
    return load_task(task, TASKS[task], None if folder is None else str(folder), **wanted)


@pytest.mark.parametrize("task", TASKS)
def test_examples_of_every_task(task: str, tmp_path: Path) -> None:
    data = load(task, write_rows(tmp_path / "rows", task))
    assert [len(split) for split in (data.train, data.dev, data.test)] == [16, 16, 12]
    for example in data.train:
        assert example.references == (() if task != "squad" else (example.fields["answer"], example.references[1]))
        assert 0 <= example.label < len(TASKS[task].causal.words)


def numbered(folder: Path, train: int = 40, validation: int = 30) -> Path:
    """Sentences that are numbers, and no other in one split than in the other, as CSV."""
    folder.mkdir()
    for split, start, stop in (("train", 0, train), ("validation", train, train + validation)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerows([["sentence", "label"], *([f"no. {number}", number % 2] for number in range(start, stop))])
    return folder


def test_splits_are_sampled_by_seed_and_the_test_is_not(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "numbered")
    one, again, other = (load("sst2", folder, seed=seed, train=10, dev=9, test=8) for seed in (0, 0, 1))
    assert one == again and one.test == other.test and one.train != other.train
    parts = [{example.fields["sentence"] for example in split} for split in (one.train, one.dev, one.test)]
    assert [len(part) for part in parts] == [10, 9, 8]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]


def test_parquet_is_read(tmp_path: Path) -> None:
    import datasets

    for split in ("train", "validation"):
        rows = datasets.Dataset.from_list([{"sentence": "fine", "label": 1}] * 4)
        rows.to_parquet(tmp_path / "rows" / f"{split}.parquet")
    assert {example.label for example in load("sst2", tmp_path / "rows").train} == {1}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SPLITS = ("train.jsonl", "validation.jsonl")
BAD_DATA = {
    "no file": ({}, r"--task-data: expected one file validation\.parquet\|.*, got \[\]"),
    "two files": ({"validation.csv": "a\n1\n", "validation.jsonl": "{}"}, r"got \['validation.jsonl', 'valid.*csv'\]"),
    "an empty file": ({"validation.jsonl": ""}, r"expected one file .*, not empty, .* got \[\]"),
    "two kinds": ({"validation.csv": "sentence,label\na,1\n"}, r"files of one kind, got \['csv', 'json'\]"),
    "no JSON": ({"validation.jsonl": '{"sentence": \n'}, r"validation.jsonl, line 1: expected a JSON .*Expecting"),
    "no label": (
        dict.fromkeys(SPLITS, lines({"sentence": "a"})),
        r"train.jsonl, line 1: expected the keys sentence and label, got none named \['label'\]",
    ),
    "no such label": (
        {"validation.jsonl": lines(*[{"sentence": "a", "label": -1}] * 2)}, "expected labels from 0 to 1, got -1"
    ),
    "a label that is a word": (
        dict.fromkeys(SPLITS, lines(*[{"sentence": "a", "label": "good"}] * 2)),
        r"--task sst2, .*train.jsonl, line \d: expected a row with sentence, label, got .*good",
    ),
    "a number for a text": (
        dict.fromkeys(SPLITS, lines(*[{"sentence": 7, "label": 1}] * 2)), "expected a row with sentence, label, got .*7"
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_DATA)
def test_bad_data(bad: str, tmp_path: Path) -> None:
    files, message = BAD_DATA[bad]
    write_rows(tmp_path / "rows", "sst2", train=4)
    (tmp_path / "rows" / "validation.jsonl").unlink()
    for name, content in files.items():
        (tmp_path / "rows" / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load("sst2", tmp_path / "rows")


def test_more_examples_than_there_are(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", "sst2")
    for counts, message in (
        ({"dev": 33}, "--dev-examples: expected 1 to 32, the number of rows that are left, got 33"),
        ({"dev": 8, "train": 25}, "--train-examples: expected 1 to 24, the number of rows that are left, got 25"),
        ({"test": 13}, "--test-examples: expected 1 to 12, the number of rows that are left, got 13"),
    ):
        with pytest.raises(ValueError, match=message):
            load("sst2", folder, **counts)


def test_a_question_without_answers_is_refused(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", "squad", train=2, validation=1)
    row = {**row_of("squad", random.Random(0)), "answers": {"text": [], "answer_start": []}}
    (folder / "train.jsonl").write_text(lines(row, row_of("squad", random.Random(0))), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: expected an answer in every row, got none"):
        load("squad", folder)


def test_the_hub_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def nothing(*names: Any, **files: Any) -> None:
        asked.append((names, files))
        raise datasets.exceptions.DatasetNotFoundError("away")

    monkeypatch.setattr(datasets, "load_dataset", nothing)
    with pytest.raises(ValueError, match=r"--task rte: expected to load aps/super_glue \(--task-data FOLDER .*away"):
        load("rte", None)
    assert asked == [(("aps/super_glue", "rte"), {"data_files": None})]


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"expected the package datasets to be installed: pip install 'zo_kernels\[tasks\]'"
    ):
        load("rte", None)


# Generated answers


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The  Eiffel tower.", ["Eiffel Tower"], 1.0, 1.0),
        ("in 1889", ["1889", "the year 1889"], 0.0, 2 / 3),
        ("a red red hat", ["red hat with red ribbon"], 0.0, 3 * 2 / (3 + 5)),
        ("blue", ["red"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("", ["red"], 0.0, 0.0),
        ("theatre", ["atre"], 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert answers.exact_match(answer, references) == exact
    assert answers.f1(answer, references) == pytest.approx(f1)
