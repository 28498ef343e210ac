"""A tiny random model of every kind of head that transformers has, sixteen rows for it, and ways to have a loss.

Rows have different numbers of labels where a loss ignores some, so that a mean of means is not the mean of all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_trainer import made, seeded
from torch import Tensor, nn

from zo_kernels.integrations.transformers import ZOTrainer

ROWS, LENGTH, WORDS, CLASSES = 16, 6, 32, 3
_TEXT = {
    "vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "pad_token_id": 0, "num_labels": CLASSES,
}  # fmt: skip
_SEEING = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4,
    "patch_size": 2, "num_labels": CLASSES,
}  # fmt: skip
_HEARING = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (8,),
    "conv_stride": (4,), "conv_kernel": (4,), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "vocab_size": 8, "feat_extract_norm": "layer", "apply_spec_augment": False,
}  # fmt: skip
_PAIRED = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": WORDS, "max_position_embeddings": 16,
}  # fmt: skip
_T5 = {
    "vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


class Partly(nn.Module):
    """Divides its tokens' loss by the number that it is told, and adds a mean of its own, as a router's loss is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor, **told: Any) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        tokens = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        mine = (labels != -100).sum()
        kept = (logits.square().mean(-1) * (labels != -100)).sum() / mine
        return {"loss": tokens / told.get("num_items_in_batch", mine) + kept, "logits": logits}


class WithoutKeywords(Partly):
    """Told nothing: a mean over its own tokens."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(input_ids, labels)


def _bert(head: str, **options: Any) -> nn.Module:
    return getattr(transformers, f"Bert{head}")(transformers.BertConfig(**{**_TEXT, **options}))


def _other(family: str, head: str, options: dict[str, Any]) -> nn.Module:
    return getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**options))


def _deaf(model: Any) -> nn.Module:
    """Trainer gives no keywords to a model that says so."""
    model.accepts_loss_kwargs = False
    return model


def rows(kind: str) -> list[dict[str, Any]]:
    """For a model whose labels are of that kind."""
    draw, result = torch.Generator().manual_seed(0), []
    for i in range(ROWS):
        ids = torch.randint(2, WORDS, (LENGTH,), generator=draw)
        some = ids.clone()
        some[: i % (LENGTH - 1)] = -100
        result.append(
            {
                "class": {"input_ids": ids, "labels": i % CLASSES},
                "number": {"input_ids": ids, "labels": float(i % 5)},
                "classes": {"input_ids": ids, "labels": torch.tensor([float(i % 2), 1.0, float(i % 3 == 0)])},
                "token classes": {"input_ids": ids, "labels": torch.where(some == -100, some, some % CLASSES)},
                "tokens": {"input_ids": ids, "labels": some},
                "choice": {"input_ids": torch.stack([ids, ids.flip(0)]), "labels": i % 2},
                "span": {"input_ids": ids, "start_positions": i % 3, "end_positions": 3 + i % 3},
                "next": {"input_ids": ids, "labels": i % 2},
                "both": {"input_ids": ids, "labels": ids, "next_sentence_label": i % 2},
                "image": {"pixel_values": torch.randn(3, 4, 4, generator=draw), "labels": i % CLASSES},
                "sound": {"input_values": torch.randn(64, generator=draw), "labels": i % 2},
                "said": {
                    "input_values": torch.randn(64, generator=draw),
                    "labels": torch.where(some == -100, some, 1 + some % 7).flip(0),
                },
            }[kind]
        )
    return result


# Each head -> the kind of its rows, and what builds it.
HEADS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "sequence": ("class", lambda: _bert("ForSequenceClassification")),
    "sequence of Llama": ("class", lambda: _other("Llama", "ForSequenceClassification", _TEXT)),
    "regression": ("number", lambda: _bert("ForSequenceClassification", num_labels=1)),
    "multi-label": ("classes", lambda: _bert("ForSequenceClassification", problem_type="multi_label_classification")),
    "token": ("token classes", lambda: _bert("ForTokenClassification")),
    "token of Llama": ("token classes", lambda: _other("Llama", "ForTokenClassification", _TEXT)),
    "multiple choice": ("choice", lambda: _bert("ForMultipleChoice")),
    "question answering": ("span", lambda: _bert("ForQuestionAnswering", num_labels=2)),
    "question answering of Llama": ("span", lambda: _other("Llama", "ForQuestionAnswering", _TEXT)),
    "causal": ("tokens", lambda: _other("Llama", "ForCausalLM", _TEXT)),
    "causal, told nothing": ("tokens", lambda: _deaf(_other("Llama", "ForCausalLM", _TEXT))),
    "masked": ("tokens", lambda: _bert("ForMaskedLM")),
    "seq2seq of T5": ("tokens", lambda: _other("T5", "ForConditionalGeneration", _T5)),
    "seq2seq of BART": ("tokens", lambda: _other("Bart", "ForConditionalGeneration", _PAIRED)),
    "next sentence": ("next", lambda: _bert("ForNextSentencePrediction")),
    "pretraining": ("both", lambda: _bert("ForPreTraining")),
    "image": ("image", lambda: _other("ViT", "ForImageClassification", _SEEING)),
    "sound": ("sound", lambda: _other("Wav2Vec2", "ForSequenceClassification", _HEARING)),
    "speech, summed": ("said", lambda: _other("Wav2Vec2", "ForCTC", {**_HEARING, "ctc_loss_reduction": "sum"})),
    "speech, mean": ("said", lambda: _other("Wav2Vec2", "ForCTC", {**_HEARING, "ctc_loss_reduction": "mean"})),
    "divided in parts": ("tokens", Partly),
    "told nothing": ("tokens", WithoutKeywords),
}


def divided(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    kept = labels != -100
    return (outputs.logits.square().mean(-1) * kept).sum() / num_items_in_batch


def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    return outputs.logits.square().mean(-1)[labels != -100].mean()


class DividesByItself(ZOTrainer):
    """As scripts do that were written for a Trainer that does not."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **told: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class Scaled(ZOTrainer):
    """Says that its losses are to be added up: this one's are divided by the rows of the whole step."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **told: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss * len(inputs["labels"]) / ROWS * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


# Each way to have a loss -> the head, and options of the trainer.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{head: (head, {}) for head in HEADS},
    "smoothed labels": ("causal", {"label_smoothing_factor": 0.2}),
    "smoothed classes": ("sequence", {"label_smoothing_factor": 0.2}),
    "a function that divides": ("masked", {"compute_loss_func": divided}),
    "a function that takes the mean": ("masked", {"compute_loss_func": mean}),
    "a method that divides by the micro-batches": ("sequence", {"cls": DividesByItself}),
    "a method that says that it divides": ("sequence", {"cls": Scaled}),
    "processes that take means of their own": ("sequence", {"average_tokens_across_devices": False}),
    "anchors": ("token", {"method": "mezo-svrg", "anchor_examples": 13}),
}


def trainer_of(way: str, out: Path, size: int, accumulated: int, **options: Any) -> ZOTrainer:
    """Whose one step leaves the weights as they are, and has an eps that makes losses differ."""
    head, own = WAYS[way]
    kind, build = HEADS[head]
    return made(
        out, seeded(build), rows(kind), eval_dataset=rows(kind), max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **{"eps": 0.1, **own, **options},
    )  # fmt: skip
