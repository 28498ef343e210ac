"""Models of real shapes with random weights, built from their configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
class Shape:
    """A model's make, and the batch it is stepped on unless the options say otherwise."""

    build: Callable[[int, int, torch.device], Task]
    batch: int
    tokens: int


def _tokens(batch: int, tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(device)


def _bert(vocabulary: int, layers: int, hidden: int, intermediate: int) -> Callable[[int, int, torch.device], Task]:
    """An encoder under the head that zo-finetune trains."""

    def build(batch: int, tokens: int, device: torch.device) -> Task:
        from transformers import BertConfig, BertModel

        from zo_kernels.finetune.model import Classifier

        config = BertConfig(
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=max(1, hidden // 32),
        )
        torch.manual_seed(0)
        encoder = BertModel(config, add_pooling_layer=False)
        model = Classifier(encoder, hidden, _LABELS).to(device).eval()
        ids = _tokens(batch, tokens, vocabulary, device)
        mask, labels = torch.ones_like(ids), torch.arange(batch, device=device) % _LABELS
        return Task(model, lambda m: F.cross_entropy(m(ids, mask), labels))

    return build


def _opt_125m(batch: int, tokens: int, device: torch.device) -> Task:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig()  # its defaults are those of OPT-125M
    torch.manual_seed(0)
    model: nn.Module = OPTForCausalLM(config)
    model.to(device).eval()
    ids = _tokens(batch, tokens, config.vocab_size, device)
    return Task(model, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss)


# Batches of 32 first sentences of docstrings, cut at 48 tokens, are padded to 34 tokens on average.
SHAPES = {
    "tiny": Shape(_bert(128, layers=3, hidden=32, intermediate=64), batch=4, tokens=8),
    "minilm": Shape(_bert(_VOCABULARY_OF_BERT, layers=6, hidden=384, intermediate=1536), batch=32, tokens=34),
    "opt-125m": Shape(_opt_125m, batch=8, tokens=64),
}
