"""Models of real shapes with random weights, built from their configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_VOCABULARY_OF_BERT = 30522
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


@dataclass(frozen=True)
class Shape:
    """A model's make, and the batch it is stepped on unless the options say otherwise.

    Args:
        build: makes the model with random weights, and the loss of a batch of random tokens.
        batch: on a CPU.
        gpu_batch: on a GPU.
        large: bf16 is its default on a GPU.
    """

    build: Callable[[Batch, torch.device, torch.dtype], Task]
    batch: Batch
    gpu_batch: Batch
    large: bool = False

    def parameters(self) -> list[Tensor]:
        """Of the model, without memory."""
        return list(self.build(Batch(1, 2), torch.device("meta"), torch.float32).model.parameters())


def _tokens(batch: Batch, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch.examples, batch.tokens), generator=generator).to(device)


def _bert(vocabulary: int, layers: int, hidden: int, intermediate: int) -> Callable[..., Task]:
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
        torch.manual_seed(0)
        with _born_on(device):
            encoder = BertModel(config, add_pooling_layer=False)
            model = Classifier(encoder, hidden, _LABELS)
        model.to(device, dtype).eval()
        ids = _tokens(batch, vocabulary, device)
        mask, labels = torch.ones_like(ids), torch.arange(batch.examples, device=device) % _LABELS
        return Task(model, lambda m: F.cross_entropy(m(ids, mask).float(), labels))

    return build


def _causal(model_name: str, config_name: str, **sizes: Any) -> Callable[..., Task]:
    """A language model of transformers with the loss of predicting each next token."""

    def build(batch: Batch, device: torch.device, dtype: torch.dtype) -> Task:
        import transformers

        config = getattr(transformers, config_name)(**sizes)
        torch.manual_seed(0)
        with _born_on(device):
            model = getattr(transformers, model_name)._from_config(config, dtype=dtype)
        model.to(device).eval()
        ids = _tokens(batch, config.vocab_size, device)
        return Task(model, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss)

    return build


def _born_on(device: torch.device) -> AbstractContextManager[Any]:
    """Where weights are made: billions of random numbers take a CPU minutes. On a CPU, nothing changes."""
    return nullcontext() if device.type == "cpu" else device


def _opt(**sizes: Any) -> Callable[..., Task]:
    return _causal("OPTForCausalLM", "OPTConfig", **sizes)


# Batches of 32 first sentences of docstrings, cut at 48 tokens, are padded to 34 tokens on average.
_SENTENCES = Batch(32, 34)
_LONG = Batch(16, 256)
SHAPES = {
    "tiny": Shape(_bert(128, layers=3, hidden=32, intermediate=64), Batch(4, 8), Batch(4, 8)),
    "opt-tiny": Shape(
        _opt(
            vocab_size=128,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            word_embed_proj_dim=32,
        ),
        Batch(4, 8),
        Batch(4, 8),
    ),
    "minilm": Shape(_bert(_VOCABULARY_OF_BERT, layers=6, hidden=384, intermediate=1536), _SENTENCES, _SENTENCES),
    "opt-125m": Shape(_opt(), Batch(8, 64), _LONG),  # the defaults of OPTConfig
    # From the config.json of facebook/opt-1.3b, facebook/opt-13b and huggyllama/llama-7b.
    "opt-1.3b": Shape(
        _opt(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048),
        Batch(1, 64),
        _LONG,
        large=True,
    ),
    "opt-13b": Shape(
        _opt(hidden_size=5120, ffn_dim=20480, num_hidden_layers=40, num_attention_heads=40, word_embed_proj_dim=5120),
        Batch(1, 64),
        _LONG,
        large=True,
    ),
    "llama-7b": Shape(
        _causal("LlamaForCausalLM", "LlamaConfig"),  # the defaults of LlamaConfig
        Batch(1, 64),
        _LONG,
        large=True,
    ),
}
