"""Models of real shapes with random weights, built from their configurations: nothing is downloaded."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LABELS = 7


@dataclass(frozen=True)
class Task:
    """A model, and the loss of one batch of random tokens on it or on a copy of it."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Batch:
    examples: int
    tokens: int


Build = Callable[[Batch, torch.device, torch.dtype], Task]


@dataclass(frozen=True)
class Shape:
    """A model's make, and the batch it is stepped on unless the options say otherwise.

    Args:
        build: makes the model with random weights, and the loss of a batch of random tokens.
        batch: on a CPU.
        gpu_batch: on a GPU.
        large: bf16 is its default on a GPU.
    """

    build: Build
    batch: Batch
    gpu_batch: Batch
    large: bool = False

    def parameters(self) -> list[Tensor]:
        """Of the model, without memory."""
        return list(self.build(Batch(1, 2), torch.device("meta"), torch.float32).model.parameters())

    def batch_of(self, options: Namespace, device: torch.device) -> Batch:
        usual = self.batch if device.type == "cpu" else self.gpu_batch
        return Batch(options.batch or usual.examples, options.tokens or usual.tokens)


def device_of(options: Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _tokens(batch: Batch, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch.examples, batch.tokens), generator=generator).to(device)


def _born_on(device: torch.device) -> Any:
    """Where weights are made: billions of random numbers take a CPU minutes. On a CPU, nothing changes."""
    torch.manual_seed(0)
    return nullcontext() if device.type == "cpu" else device


def _bert(vocabulary: int, layers: int, hidden: int, intermediate: int) -> Build:
    """An encoder under the head that zo-finetune trains."""

    def build(batch: Batch, device: torch.device, dtype: torch.dtype) -> Task:
        from transformers import BertConfig, BertModel

        from zo_kernels.finetune.classifier.model import Classifier

        config = BertConfig(
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=max(1, hidden // 32),
        )
        with _born_on(device):
            model = Classifier(BertModel(config, add_pooling_layer=False), hidden, _LABELS)
        model.to(device, dtype).eval()
        ids = _tokens(batch, vocabulary, device)
        mask, labels = torch.ones_like(ids), torch.arange(batch.examples, device=device) % _LABELS
        return Task(model, lambda m: F.cross_entropy(m(ids, mask).float(), labels))

    return build


def _causal(model_type: str, **sizes: int) -> Build:
    """A language model of transformers with the loss of predicting each next token."""

    def build(batch: Batch, device: torch.device, dtype: torch.dtype) -> Task:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(model_type, **sizes)
        with _born_on(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.to(device).eval()
        ids = _tokens(batch, config.vocab_size, device)
        return Task(model, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss)

    return build


def opt_model(hidden: int, ffn: int, layers: int, heads: int, vocabulary: int = 50272, positions: int = 2048) -> Build:
    return _causal(
        "opt",
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
    )


# Batches of 32 first sentences of docstrings, cut at 48 tokens, are padded to 34 tokens on average.
_SENTENCES = Batch(32, 34)
_SHORT, _LONG = Batch(1, 64), Batch(16, 256)
_TINY = Batch(4, 8)
SHAPES = {
    "tiny": Shape(_bert(128, layers=3, hidden=32, intermediate=64), _TINY, _TINY),
    "opt-tiny": Shape(opt_model(32, 64, layers=3, heads=2, vocabulary=128), _TINY, _TINY),
    "minilm": Shape(_bert(30522, layers=6, hidden=384, intermediate=1536), _SENTENCES, _SENTENCES),
    # From the config.json of facebook/opt-125m, opt-1.3b and opt-13b, and of huggyllama/llama-7b.
    "opt-125m": Shape(opt_model(768, 3072, layers=12, heads=12), Batch(8, 64), _LONG),
    "opt-1.3b": Shape(opt_model(2048, 8192, layers=24, heads=32), _SHORT, _LONG, large=True),
    "opt-13b": Shape(opt_model(5120, 20480, layers=40, heads=40), _SHORT, _LONG, large=True),
    "llama-7b": Shape(_causal("llama"), _SHORT, _LONG, large=True),  # the defaults of LlamaConfig
}
