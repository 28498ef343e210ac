"""The tasks that are learned with prompts, as data. To add a task, add an entry to `TASKS`.

A template names fields in braces; `{mask}` stands for the mask token of the model. With a causal model, the words of
each label are appended to the prompt and scored. With a masked model, the word of each label is scored at the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

# The papers that the templates come from, by arXiv number.
MEZO, LM_BFF, PET = "2305.17333", "2012.15723", "2009.07118"


@dataclass(frozen=True)
class Template:
    """A prompt for one kind of model.

    `words` has the text that stands for each label. It may name fields, too: the candidates of a multiple choice, or
    the answer to be generated. `cut` names the field that is shortened if a prompt is too long. `source` is its paper.
    """

    prompt: str
    words: tuple[str, ...]
    cut: str
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The labels, as users read them."""
        return tuple(word.strip(" {}\n") for word in self.words)


def _label(row: Row) -> int:
    label = row["label"]
    if (number := int(label)) != label and not isinstance(label, str):  # 0.7 is not a label
        raise ValueError(f"label: expected a whole number, got {label!r}")
    return number


@dataclass(frozen=True)
class Task:
    """Everything that distinguishes one task from another.

    Args:
        hub: name and configuration of the data set on the hub. It has the splits train and validation.
        columns: the columns that its rows must have.
        causal, masked: the templates; None if there is none for that kind of model.
        fields: makes the fields that the templates name from a row, which need not have a label.
        label: the index of a row's label in the words of the template.
        dev_examples: default number of development examples, if the training split has at least twice as many.
        loss: default loss: over the "candidates", or over the "tokens" of the right answer.
        references: the right answers of a row, if the task is learned by generating answers; else None.
    """

    hub: tuple[str, str | None]
    columns: tuple[str, ...]
    causal: Template
    masked: Template | None
    fields: Callable[[Row], dict[str, str]]
    label: Callable[[Row], int] = _label
    dev_examples: int = 500
    loss: str = "candidates"
    references: Callable[[Row], tuple[str, ...]] | None = None


def _named(*columns: str) -> Callable[[Row], dict[str, str]]:
    """Take columns as fields, without white space around them."""
    return lambda row: {column: row[column].strip() for column in columns}


def _inference(row: Row) -> dict[str, str]:
    """Masked templates make the premise a question: they use `claim` and `lowered` for premise and hypothesis."""
    premise, hypothesis = row["premise"].strip(), row["hypothesis"].strip()
    return {
        "premise": premise,
        "hypothesis": hypothesis,
        "claim": premise.rstrip(".,;:!?"),
        "lowered": hypothesis[:1].lower() + hypothesis[1:],
    }


def _boolq(row: Row) -> dict[str, str]:
    question = row["question"].strip().removesuffix("?")
    return {"passage": row["passage"].strip(), "question": f"{question[:1].upper()}{question[1:]}?"}


def _copa(row: Row) -> dict[str, str]:
    """Each choice continues the sentence of the premise, so it begins with a small letter."""
    connective = {"cause": "because", "effect": "so"}
    if row["question"] not in connective:
        raise ValueError(f"question: expected cause or effect, got {row['question']!r}")
    fields = {
        "premise": row["premise"].strip().removesuffix("."),
        "connective": connective[row["question"]],
    }
    for name in ("choice1", "choice2"):
        choice = row[name].strip()
        fields[name] = choice if choice.split(" ")[0] == "I" else choice[:1].lower() + choice[1:]
    return fields


def _squad(row: Row) -> dict[str, str]:
    answers = row["answers"]["text"] if "answers" in row else []
    return {**_named("title", "context", "question")(row), "answer": answers[0].strip() if len(answers) else ""}


_SUPER_GLUE = "aps/super_glue"
_NLI_MASKED = "{claim}? {mask}, {lowered}"

TASKS: Mapping[str, Task] = {
    "sst2": Task(
        hub=("stanfordnlp/sst2", None),
        columns=("sentence", "label"),
        fields=_named("sentence"),
        causal=Template("{sentence} It was", (" terrible", " great"), "sentence", MEZO),
        masked=Template("{sentence} It was {mask}.", ("terrible", "great"), "sentence", LM_BFF),
    ),
    "rte": Task(
        hub=(_SUPER_GLUE, "rte"),
        columns=("premise", "hypothesis", "label"),
        fields=_inference,
        causal=Template(
            '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', ("Yes", "No"), "premise", MEZO
        ),
        masked=Template(_NLI_MASKED, ("Yes", "No"), "claim", LM_BFF),
    ),
    "cb": Task(
        hub=(_SUPER_GLUE, "cb"),
        columns=("premise", "hypothesis", "label"),
        fields=_inference,
        causal=Template(
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
            "premise",
            MEZO,
        ),
        masked=Template(_NLI_MASKED, ("Yes", "No", "Maybe"), "claim", LM_BFF),
        dev_examples=100,
    ),
    "boolq": Task(
        hub=(_SUPER_GLUE, "boolq"),
        columns=("passage", "question", "label"),
        fields=_boolq,
        causal=Template("{passage} {question}", (" No", " Yes"), "passage", MEZO),
        masked=Template("{passage} Question: {question} Answer: {mask}.", ("No", "Yes"), "passage", PET),
    ),
    "wic": Task(
        hub=(_SUPER_GLUE, "wic"),
        columns=("word", "sentence1", "sentence2", "label"),
        fields=_named("word", "sentence1", "sentence2"),
        causal=Template(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
            ("No", "Yes"),
            "sentence1",
            MEZO,
        ),
        masked=Template(
            '"{sentence1}" / "{sentence2}" Similar sense of "{word}"? {mask}.', ("No", "Yes"), "sentence1", PET
        ),
    ),
    "copa": Task(
        hub=(_SUPER_GLUE, "copa"),
        columns=("premise", "choice1", "choice2", "question", "label"),
        fields=_copa,
        causal=Template("{premise} {connective}", (" {choice1}", " {choice2}"), "premise", MEZO),
        masked=None,
        dev_examples=100,
        loss="tokens",
    ),
    "squad": Task(
        hub=("rajpurkar/squad", None),
        columns=("title", "context", "question", "answers"),
        fields=_squad,
        causal=Template(
            "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", (" {answer}\n",), "context", MEZO
        ),
        masked=None,
        label=lambda row: 0,
        loss="tokens",
        references=lambda row: tuple(row["answers"]["text"]),
    ),
}
