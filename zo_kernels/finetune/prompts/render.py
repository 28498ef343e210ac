"""Render examples as the token ids of prompts, and shorten prompts that are too long."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from zo_kernels.finetune.tasks import Template

T = TypeVar("T")


@dataclass(frozen=True)
class CausalPrompt:
    """Token ids of the prompt alone (`prompt`) and of the prompt with each candidate (`rows`).

    `answers` has the number of tokens at the end of each row that are the candidate. `cut` tells whether the text was
    shortened.
    """

    prompt: list[int]
    rows: list[list[int]]
    answers: list[int]
    cut: bool = False


@dataclass(frozen=True)
class MaskedPrompt:
    """Token ids and the position of the mask in them. `cut` tells whether the text was shortened."""

    ids: list[int]
    mask: int
    cut: bool = False


class CausalPrompts:
    """Renders examples for a causal model.

    Args:
        tokenizer: special tokens that it puts before a text are kept; those after a text are left out.
        template: of the task, for causal models.
        max_tokens: the longest prompt with its longest candidate.
        room: number of tokens to leave after the prompt for the generated answer.
    """

    def __init__(self, tokenizer: Any, template: Template, max_tokens: int, room: int = 0) -> None:
        self._tokenizer, self._template, self._max_tokens, self._room = tokenizer, template, max_tokens, room
        self._beginning = _beginning(tokenizer)

    def __call__(self, fields: dict[str, str]) -> CausalPrompt:
        """Raises ValueError if the prompt is too long even without the field to cut, or a candidate has no tokens."""
        words = [word.format(**fields) for word in self._template.words]

        def render(text: str) -> CausalPrompt:
            prompt = self._template.prompt.format(**{**fields, self._template.cut: text})
            alone, rows = self._encode(prompt), [self._encode(prompt + word) for word in words]
            # Prompt and word are tokenised as one text, as in pretraining. The word begins where a row leaves the
            # prompt.
            answers = [len(row) - _shared(row, alone) for row in rows]
            return CausalPrompt(alone, rows, answers, text != fields[self._template.cut])

        def tokens(prompt: CausalPrompt) -> int:
            return max(len(prompt.prompt) + self._room, *map(len, prompt.rows))

        prompt = _shortened(render, tokens, fields, self._template.cut, self._max_tokens)
        if any(not 0 < answer < len(row) for row, answer in zip(prompt.rows, prompt.answers, strict=True)):
            raise ValueError(f"--model: expected a tokenizer that makes tokens of a prompt and of each of {words}")
        return prompt

    def _encode(self, text: str) -> list[int]:
        return [*self._beginning, *self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


class MaskedPrompts:
    """Renders examples for a masked model.

    Args:
        tokenizer: one with a mask token.
        template: of the task, for masked models.
        max_tokens: the longest prompt.

    Raises:
        ValueError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: Any, template: Template, max_tokens: int) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError("--model: expected a masked model's tokenizer, got one without a mask token")
        self._tokenizer, self._template, self._max_tokens = tokenizer, template, max_tokens

    def __call__(self, fields: dict[str, str]) -> MaskedPrompt:
        """Raises ValueError if the prompt is too long even without the field to cut, or its texts contain a mask."""
        mask, mask_id = self._tokenizer.mask_token, self._tokenizer.mask_token_id

        def render(text: str) -> MaskedPrompt:
            prompt = self._template.prompt.format(**{**fields, self._template.cut: text}, mask=mask)
            ids = self._tokenizer(prompt, verbose=False)["input_ids"]
            if ids.count(mask_id) != 1:
                raise ValueError(f"--task: expected texts without the model's mask {mask}, got {reprlib.repr(fields)}")
            return MaskedPrompt(ids, ids.index(mask_id), text != fields[self._template.cut])

        return _shortened(render, lambda prompt: len(prompt.ids), fields, self._template.cut, self._max_tokens)


def single_tokens(tokenizer: Any, words: tuple[str, ...]) -> list[int]:
    """The token id of each label word after a space.

    Raises ValueError that names a word which is not a single token.
    """
    tokens = []
    for word in words:
        ids = tokenizer(" " + word, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(f"--model: expected a tokenizer with one token for the label word {word!r}, got {pieces}")
        tokens.append(ids[0])
    return tokens


def _shortened(
    render: Callable[[str], T], tokens: Callable[[T], int], fields: dict[str, str], cut: str, limit: int
) -> T:
    """Render the field `cut`, or as many of its first characters as fit into `limit` tokens."""
    text = fields[cut]
    whole = render(text)
    if tokens(whole) <= limit:
        return whole
    fitting = render("")
    if tokens(fitting) > limit:
        raise ValueError(
            f"--max-tokens: expected at least {tokens(fitting)}, the length of a prompt without its {cut}, got {limit}"
        )
    most, too_many = 0, len(text)
    while too_many - most > 1:
        middle = (most + too_many) // 2
        shorter = render(text[:middle].rstrip())
        if tokens(shorter) <= limit:
            most, fitting = middle, shorter
        else:
            too_many = middle
    return fitting


def _beginning(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    bare, whole = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"], tokenizer("a")["input_ids"]
    at = next(at for at in range(len(whole) + 1) if whole[at : at + len(bare)] == bare)
    return whole[:at]


def _shared(one: list[int], other: list[int]) -> int:
    """The number of tokens that both begin with."""
    unlike = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))
