"""A pretrained encoder with a linear head on the mean of its last states, as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_kernels.finetune.classifier.batches import Texts
from zo_kernels.finetune.pretrained import ensure_padding, no_progress_bars

# Sentence encoders of this kind were trained with cosine similarities times 20 as logits.
SCALE = 20.0


class Classifier(nn.Module):
    """logits = W·(20·e) + b, where e is the L2-normalised mean of the encoder's last states, padding excluded."""

    encoder: Any

    def __init__(self, encoder: nn.Module, hidden_size: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden_size, labels)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors [batch, hidden] in the dtype of the weights. Ids and the 0/1 mask are int64 [batch, tokens]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, labels] in fp32, for weights of any dtype."""
        return self.head(SCALE * self.embed(input_ids, attention_mask)).float()


def load_encoder(model: str, dtype: torch.dtype, *, whole: bool = False) -> tuple[nn.Module, Any, int]:
    """Load an encoder from a folder or a hub id. Returns it in evaluation mode, with its tokenizer and its hidden size.

    If the model has a decoder, only its encoder is used. A pooling layer is frozen, since it does not affect the loss.

    Raises ValueError naming --model if transformers cannot load it or, with `whole`, if a weight is missing.
    """
    import transformers

    try:
        with no_progress_bars():
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            loaded, report = transformers.AutoModel.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model: expected a folder or hub id that transformers can load, got {model!r}: {error}"
        ) from error
    if whole and (missing := sorted(report["missing_keys"])):
        raise ValueError(f"{model}: expected all weights of the encoder, but it lacks {', '.join(missing[:3])}")
    ensure_padding(tokenizer, model)
    encoder = loaded.get_encoder() if loaded.config.is_encoder_decoder else loaded
    if (pooler := getattr(encoder, "pooler", None)) is not None:
        pooler.requires_grad_(False)
    return encoder.eval(), tokenizer, int(loaded.config.hidden_size)


@torch.no_grad()
def start_head(
    classifier: Classifier, start: str, tokenizer: Any, names: Sequence[str], train: Texts, shots: int
) -> None:
    """Initialise the head before training.

    "names" sets the weights of each label to the embedding of its name, and uses no labelled example. "few-shot" sets
    them to the mean embedding of the label's first `shots` training examples. Both subtract the mean over labels and
    set the bias to 0. "random" keeps the initialisation of nn.Linear.
    """
    if start == "random":
        return
    if start == "names":
        if wordless := [name for name in names if not any(c.isalpha() for c in name)]:
            raise ValueError(
                f"--head-start names: expected labels that are words, got {wordless}; use --head-start few-shot"
            )
        examples = Texts.tokenize(tokenizer, names, range(len(names)), train.max_tokens, train.device)
        means = _embeddings(classifier, examples, range(len(examples)))
    else:
        chosen = [_first_of(train.labels.tolist(), label, shots) for label in range(len(names))]
        means = torch.stack([_embeddings(classifier, train, indices).mean(0) for indices in chosen])
    classifier.head.weight.copy_(means - means.mean(0))
    classifier.head.bias.zero_()


def _embeddings(classifier: Classifier, texts: Texts, indices: Sequence[int]) -> Tensor:
    batch = texts.batch(indices)
    return classifier.embed(batch.input_ids, batch.attention_mask).float()


def _first_of(labels: Sequence[int], label: int, count: int) -> list[int]:
    found = [index for index, other in enumerate(labels) if other == label][:count]
    if len(found) < count:
        raise ValueError(
            f"--shots: expected at most {len(found)}, since a label has only so many examples, got {count}"
        )
    return found
