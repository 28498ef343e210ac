"""`prompts`: is a docstring a class's or a function's? A tiny causal language model scores both answers to a prompt.

It is pretrained here on the reference manual and on most docstrings of the standard library, asked in one way. It is
fine-tuned on others, asked in another. Prompts and losses are those of `zo-finetune`, with bytes as tokens.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_kernels.finetune.docstrings import first_sentence
from zo_kernels.finetune.prompts.causal import CausalBatch, CausalTexts, log_likelihoods
from zo_kernels.finetune.prompts.render import CausalPrompts
from zo_kernels.finetune.prompts.task_data import Example
from zo_kernels.finetune.tasks import Template

from ...bench.registry import Row
from ..tasks import Size, TinyLM, draw_windows, manual, pretrain

SIZES = {
    "fast": Size(8, 2, 2, 40, steps=4, rate=4e-3, pretraining_windows=2, windows=2),
    "small": Size(32, 4, 4, 40, steps=800, rate=4e-3, pretraining_windows=10, windows=4),
    "cuda": Size(256, 12, 8, 40, steps=3000, rate=1e-3, pretraining_windows=32, windows=32),
}
_WORDS = ("class", "def")
_PRETRAINED, _ASKED = "{text}\n: ", "{text} = "
_LETTERS = 26  # of a docstring
_HELD_OUT = 128  # new texts for the dev loss, and as many for the test
_NO_DOCSTRINGS = {"test", "tests", "idle_test", "site-packages", "lib2to3"}


class PromptsTask:
    """The pretrained model, and prompts of the new half; each seed has its own split and batches.

    Args:
        size: a key of SIZES; `windows` of it are the examples of a batch.
    """

    def __init__(self, size: str, device: torch.device):
        self._size, self._device = SIZES[size], device
        self._modules = "asyncio/*.py" if size == "fast" else "**/*.py"
        self._weights = _pretrained(self._size, self._modules, device)
        self._splits = cache(self._split)

    def _split(self, seed: int) -> list[CausalTexts]:
        """Dev, test, training."""
        examples = [
            Example({"text": text}, label) for label, texts in enumerate(_texts(self._modules)[1]) for text in texts
        ]
        random.Random(seed).shuffle(examples)
        render = CausalPrompts(_tokens, Template(_ASKED, _WORDS, "text", "here"), self._size.context)
        held_out = min(_HELD_OUT, len(examples) // 4)
        ends = (0, held_out, 2 * held_out, None)
        parts = [examples[start:end] for start, end in pairwise(ends)]
        return [CausalTexts.of(render, part, 0, self._device, right_only=False) for part in parts]

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = Prompted(self._size)
        model.load_state_dict(self._weights)
        return model.to(self._device, dtype).eval()

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        batches = self._splits(seed)[2].endless(self._size.windows, torch.Generator().manual_seed(seed))
        return (partial(_loss, model, batch) for batch in batches)

    def dev_loss(self, model: nn.Module, seed: int) -> float:
        return _evaluated(model, self._splits(seed)[0])["test_loss"]

    def test(self, model: nn.Module, seed: int) -> Row:
        return _evaluated(model, self._splits(seed)[1])


class Prompted(TinyLM):
    """The tiny language model, called as those of transformers are. Padding follows a row, so that no token sees it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(input_ids))


def _scores(model: nn.Module, batch: CausalBatch) -> Tensor:
    """The mean log likelihood of each candidate's bytes, (examples, candidates)."""
    sums, counts = log_likelihoods(model, batch)
    return sums / counts


def _loss(model: nn.Module, batch: CausalBatch) -> Tensor:
    return F.cross_entropy(_scores(model, batch), batch.labels)


def _evaluated(model: nn.Module, texts: CausalTexts) -> Row:
    loss, right = 0.0, 0
    for batch in texts.in_order_of_length(64):
        scores = _scores(model, batch)
        loss += F.cross_entropy(scores, batch.labels, reduction="sum").item()
        right += int((scores.argmax(1) == batch.labels).sum())
    return {"test_loss": loss / len(texts), "test_accuracy": right / len(texts)}


def _tokens(text: str, **_: bool) -> dict[str, list[int]]:
    """A tokenizer whose tokens are bytes."""
    return {"input_ids": list(text.encode("ascii", "replace"))}


@cache
def _texts(modules: str) -> tuple[list[list[str]], list[list[str]]]:
    """Beginnings of docstrings of classes and of functions: those that are known, and as many new ones of both."""
    folder, found = Path(sysconfig.get_path("stdlib")), (dict[str, None](), dict[str, None]())
    for path in sorted(folder.glob(modules)):
        if _NO_DOCSTRINGS & set(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                text = first_sentence(docstring)[:_LETTERS].rstrip()
                if len(text) > _LETTERS // 2:
                    found[isinstance(node, ast.FunctionDef)].setdefault(text)
    alone = [[text for text in own if text not in other] for own, other in (found, found[::-1])]
    new = min(map(len, alone)) // 3
    for texts in alone:
        random.Random(0).shuffle(texts)
    return [texts[new:] for texts in alone], [texts[:new] for texts in alone]


@cache
def _pretrained(size: Size, modules: str, device: torch.device) -> dict[str, Tensor]:
    """The weights of the model that has learned the manual, and to answer `_PRETRAINED`."""

    def row(text: str, word: str) -> Tensor:
        line = _PRETRAINED.format(text=text) + word
        return torch.tensor(_tokens(line.ljust(size.context + 1, "\n"))["input_ids"])

    asked = [
        torch.stack([row(text, word) for text in texts]) for texts, word in zip(_texts(modules)[0], _WORDS, strict=True)
    ]
    count, text = size.pretraining_windows, manual()

    def draw(generator: torch.Generator) -> Tensor:
        """As many of each word, and of the manual."""
        rows = [of[torch.randint(len(of), (count,), generator=generator)] for of in asked]
        return torch.cat([draw_windows(text, count, size, generator), *rows])

    return pretrain(size, device, draw)
