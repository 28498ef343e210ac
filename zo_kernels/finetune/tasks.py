"""The tasks that are learned with prompts, as data: adding one is adding an entry to `TASKS`.

A template names fields in braces; `{mask}` is the model's mask token. Of a causal model each label's words are appended
to the prompt and scored; of a masked model each label's word is scored at the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

# Where the templates come from, by arXiv number.
MEZO, LM_BFF, PET = "2305.17333", "2012.15723", "2009.07118"


@dataclass(frozen=True)
class Template:
    """A prompt, the words that stand for each label, the field that is cut if it is too long, and where it is from.

    Words may name fields, too: the candidates of a multiple choice, or the answer that is to be generated.
    """

    prompt: str
    words: tuple[str, ...]
    cut: str
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels, as a person reads them."""
        return tuple(word.strip(" {}\n") for word in self.words)


def _label(row: Row) -> int:
    label = row["label"]
    if (number := int(label)) != label and not isinstance(label, str):  # 0.7 is no label
        raise ValueError(f"label: expected a whole number, got {label!r}")
    return number


@dataclass(frozen=True)
class Task:
    """What distinguishes one task from another.

    Args:
        hub: name and configuration of the data set on the hub, with splits train and validation.
        columns: that its rows have; of these `fields` makes what the templates name.
        causal, masked: the templates, None where there is none for that kind of model.
        fields: of a row that need not have a label.
        label: index into the words.
        dev_examples: by default, where the training split has twice as many.
        loss: of training by default: over the "candidates", or on the answer's "tokens".
        references: the answers of a row any of which is right, for a task that is learned by generating; else None.
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
    """Columns as they are, but for white space around them."""
    return lambda row: {column: row[column].strip() for column in columns}


def _inference(row: Row) -> dict[str, str]:
    """`claim` and `lowered` are the premise and hypothesis of a masked template, in which the premise is a question."""
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
    """A choice goes on with the premise's sentence, so it begins with a small letter."""
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
