"""A tiny causal language model, pretrained here on text that comes with Python, to be fine-tuned to another text.

It learns the reference manual that `help()` shows, byte by byte, with AdamW; the other text is the names of Unicode's
characters in random order. In capitals, as they are, hardly a byte of them is likely to the pretrained model; in small
letters they are words that it nearly knows. Both come with CPython, so nothing is downloaded. The pretrained weights
are kept in a file whose name tells the text and the sizes that they come from.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..exactness.upcast import upcast

_VOCABULARY = 128
_LAST_CODE_POINT = 0x10000
_HELD_OUT = 0.1  # of the text that is fine-tuned to
_DEV_WINDOWS, _TEST_WINDOWS = 256, 1024


@dataclass(frozen=True)
class Size:
    """Of the model and of its training.

    Args:
        hidden, blocks, heads: of the transformer.
        context: tokens a window.
        steps, rate: of pretraining with AdamW, with a one-cycle schedule.
        pretraining_windows, windows: in a batch of pretraining and of fine-tuning.
    """

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

    mask: Tensor
    positions: Tensor

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


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "replace")))


@cache
def _manual() -> Tensor:
    """Raises ModuleNotFoundError where Python came without its manual."""
    from pydoc_data.topics import topics

    return _bytes("\n".join(topics[key] for key in sorted(topics)))


@cache
def _names(capitals: bool) -> Tensor:
    names = [unicodedata.name(chr(i), "") for i in range(_LAST_CODE_POINT)]
    # Ideographs and Hangul syllables are numbered, not named.
    names = [n for n in names if n and not n.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLL"))]
    random.Random(0).shuffle(names)
    text = "\n".join(names)
    return _bytes(text if capitals else text.lower())


def _windows(text: Tensor, count: int, size: Size, generator: torch.Generator) -> Tensor:
    start = torch.randint(len(text) - size.context, (count, 1), generator=generator)
    return text[start + torch.arange(size.context + 1)]


class LanguageTask:
    """The pretrained model, and windows of the text that it is fine-tuned to.

    Args:
        capitals: of the text that is fine-tuned to.
        size: a key of SIZES.
        device: of the model and the windows.
        folder: where pretrained weights are kept.
    """

    def __init__(self, capitals: bool, size: str, device: torch.device, folder: Path):
        self._size, self._device = SIZES[size], device
        new = _names(capitals)
        held_out = round(_HELD_OUT * len(new))
        self._training = new[held_out:]
        generator = torch.Generator().manual_seed(0)
        self._dev = _windows(new[:held_out], _DEV_WINDOWS, self._size, generator).to(device)
        self._test = _windows(new[:held_out], _TEST_WINDOWS, self._size, generator).to(device)
        self._weights = _pretrained(self._size, _manual(), device, folder)

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The pretrained model, the same for every seed. On a CPU 16-bit weights are widened in the forward."""
        model = TinyLM(self._size)
        model.load_state_dict(self._weights)
        if dtype != torch.float32:
            model.to(dtype)
            if self._device.type == "cpu":
                upcast(model)
        return model.to(self._device).eval()

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        """The loss of one minibatch after another, for ever."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            windows = _windows(self._training, self._size.windows, self._size, generator).to(self._device)
            yield lambda windows=windows: windows_loss(model, windows)

    def dev_loss(self, model: nn.Module) -> float:
        return windows_loss(model, self._dev).item()

    def test(self, model: nn.Module) -> dict[str, float]:
        return {"test_loss": windows_loss(model, self._test).item()}


def _pretrained(size: Size, text: Tensor, device: torch.device, folder: Path) -> dict[str, Tensor]:
    """The weights on the CPU; made if they are not in the folder."""
    told = hashlib.sha256(repr(astuple(size)).encode() + bytes(text.tolist())).hexdigest()[:16]
    path = folder / f"tiny-lm-{device.type}-{told}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(_pretrain(size, text, device), unfinished)
        unfinished.replace(path)
    return torch.load(path, weights_only=True)


def _pretrain(size: Size, text: Tensor, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = TinyLM(size).to(device)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, size.steps)
    with torch.enable_grad():
        for _ in range(size.steps):
            loss = windows_loss(model, _windows(text, size.pretraining_windows, size, generator).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: value.cpu() for name, value in model.state_dict().items()}
