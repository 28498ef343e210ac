"""Use a language model with the prompts of a task: predict, save and load."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.finetune.data.examples import Examples
from zo_kernels.finetune.folders import run_folder
from zo_kernels.finetune.folders.run_folder import MODEL, START, Description
from zo_kernels.finetune.learner import Predictor, checked_rows, warn_of_cut
from zo_kernels.finetune.pretrained import no_progress_bars
from zo_kernels.finetune.prompts.causal import CausalTexts, generate, log_likelihoods
from zo_kernels.finetune.prompts.language_model import load_language_model
from zo_kernels.finetune.prompts.masked import MaskedTexts, label_logits
from zo_kernels.finetune.prompts.render import CausalPrompts, MaskedPrompts, single_tokens
from zo_kernels.finetune.prompts.task_data import Example, fields_of
from zo_kernels.finetune.tasks import TASKS, Row, Task, Template

_PREDICTED_TOGETHER = 16


@dataclass(frozen=True)
class Prompted(Predictor):
    """A language model with the prompts of a task, ready for rows.

    Raises ValueError if the task has no prompts for this kind of model, or the model is masked and a label word is not
    a single token.
    """

    model: nn.Module
    tokenizer: Any
    task_name: str
    kind: str  # "causal" or "masked"
    max_tokens: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.kind == "masked" and self.task.masked is None:
            why = "its answers are generated" if self.generates else "its candidates are sentences, not single tokens"
            raise ValueError(
                f"--task {self.task_name}: expected a causal model, got a masked one, which cannot learn this task: "
                f"{why}"
            )
        if self.kind == "masked":
            _ = self._words  # raises at once if a word is not one token

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def generates(self) -> bool:
        """Whether answers are generated. Otherwise they are chosen from candidates."""
        return self.task.references is not None

    @property
    def template(self) -> Template:
        """The template of the task for this kind of model."""
        chosen = self.task.masked if self.kind == "masked" else self.task.causal
        assert chosen is not None
        return chosen

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.template.names

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @cached_property
    def _words(self) -> list[int]:
        return single_tokens(self.tokenizer, self.template.words)

    def prepare(self, examples: list[Example], *, right_only: bool = False) -> Examples[Any]:
        """Tokenise examples. With `right_only`, training batches hold only the right candidates.

        Raises ValueError if a prompt cannot be shortened enough.
        """
        pad_id = self.tokenizer.pad_token_id
        if self.kind == "masked":
            masked = MaskedPrompts(self.tokenizer, self.template, self.max_tokens)
            return MaskedTexts.of(masked, examples, pad_id, self.device)
        room = self.max_new_tokens if self.generates else 0
        causal = CausalPrompts(self.tokenizer, self.template, self.max_tokens, room)
        return CausalTexts.of(causal, examples, pad_id, self.device, right_only)

    def likelihoods(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Log likelihoods of the candidates and their numbers of tokens, both fp32 [examples, candidates].

        The quotient of the two is the score of a candidate. The log likelihoods of an example may be shifted by a
        constant.
        """
        if self.kind == "masked":
            logits = label_logits(self.model, batch, self._words)
            return logits, torch.ones_like(logits)
        return log_likelihoods(self.model, batch)

    def generate(self, texts: CausalTexts, indices: list[int]) -> list[str]:
        """Generate the answers to the examples with these indices."""
        prompts = [texts.prompts[index].prompt for index in indices]
        return generate(self.model, self.tokenizer, prompts, self.max_new_tokens)

    @torch.no_grad()
    def predict(self, rows: Iterable[Row]) -> list[str]:
        """The answer to each row, in the same order: the likeliest candidate, or a generated text.

        A row maps the columns of the task to their values; the label may be missing. Warns if texts had to be cut.

        Raises:
            TypeError: `rows` is a single row, or an element is not a mapping.
            ValueError: a column is missing, or a prompt cannot be shortened enough.
        """
        rows = checked_rows(rows, "rows")
        fields = [fields_of(f"row {at}", self.task, row) for at, row in enumerate(rows)]
        texts = self.prepare([Example(each, label=0) for each in fields])
        warn_of_cut(texts.cut, len(rows), self.max_tokens)
        answers = []
        for start in range(0, len(rows), _PREDICTED_TOGETHER):
            indices = list(range(start, min(start + _PREDICTED_TOGETHER, len(rows))))
            if self.generates:
                assert isinstance(texts, CausalTexts)
                answers += self.generate(texts, indices)
                continue
            sums, counts = self.likelihoods(texts.whole(indices))
            chosen = (sums / counts).argmax(1).tolist()
            words = self.template.words
            answers += [words[c].format(**fields[index]).strip() for index, c in zip(indices, chosen, strict=True)]
        return answers

    def save_start(self, folder: Path) -> None:
        (folder / START).mkdir(parents=True, exist_ok=True)
        run_folder.write_description(folder / START, self._description())

    def _write(self, target: Path) -> None:
        model: Any = self.model
        with no_progress_bars():
            model.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        run_folder.write_description(target, self._description())

    def _description(self) -> Description:
        return Description(self.names, self.max_tokens, self.max_new_tokens, self.task_name, self.kind)


def load_prompted(run: str | Path) -> Prompted:
    """Load the model that a finished run with prompts saved: on the CPU, in evaluation mode, in its own dtype.

    `load_prompted(run).predict([row, ...])` returns the answer to each row, a mapping of the task's columns.

    Raises FileNotFoundError if the folder has no finished run, ValueError if the run trained a classifier or its model
    is damaged.
    """
    about = run_folder.description(run)
    if about.task is None:
        raise ValueError(f"{run}: expected a run with prompts, got one that trained a classifier: use load_classifier")
    assert about.kind is not None and about.max_new_tokens is not None
    with run_folder.model_of(run):
        model, tokenizer, kind = load_language_model(str(Path(run) / MODEL), about.kind, "auto")
        return Prompted(model, tokenizer, about.task, kind, about.max_tokens, about.max_new_tokens)
