"""Learning to classify texts with an encoder and a linear head."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_kernels.finetune import run_folder
from zo_kernels.finetune.batches import Batch, Texts
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.data import Split, from_tables
from zo_kernels.finetune.docstrings import stdlib_docstrings
from zo_kernels.finetune.examples import Examples
from zo_kernels.finetune.learner import Learner, Predictor
from zo_kernels.finetune.minilm import minilm_folder
from zo_kernels.finetune.model import Classifier, freeze, load_encoder, no_progress_bars, start_head
from zo_kernels.finetune.results import Evaluation
from zo_kernels.finetune.run_folder import LABELS, MODEL, START

_HEAD = "head.safetensors"
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class TrainedClassifier(Predictor):
    """A classifier with everything needed to use it on text."""

    model: Classifier
    tokenizer: Any
    names: tuple[str, ...]
    max_tokens: int

    @torch.no_grad()
    def predict(self, texts: list[str]) -> list[str]:
        """The most likely label of each text."""
        if not texts:
            return []
        device = self.model.head.weight.device
        batch = Texts.tokenize(self.tokenizer, texts, [0] * len(texts), self.max_tokens, device).batch(
            range(len(texts))
        )
        return [self.names[label] for label in self.model(batch.input_ids, batch.attention_mask).argmax(1).tolist()]

    def save_start(self, folder: Path) -> None:
        self._save_head(folder / START)

    def save(self, folder: Path) -> None:
        target = folder / MODEL
        with no_progress_bars():
            self.model.encoder.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        self._save_head(target)

    def _save_head(self, target: Path) -> None:
        from safetensors.torch import save_file

        target.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.model.head.state_dict().items()}, target / _HEAD)
        run_folder.write_json(target / LABELS, {"names": list(self.names), "max_tokens": self.max_tokens})


@dataclass(frozen=True)
class ClassifierLearner(Learner):
    """Mean cross-entropy, and the share of right labels."""

    predictor: TrainedClassifier
    train: Texts
    dev: Texts
    test: Texts
    device: torch.device

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.predictor.model(batch.input_ids, batch.attention_mask), batch.labels)

    def evaluate(self, examples: Examples[Batch]) -> Evaluation:
        return evaluate(self.predictor.model, examples)


@torch.no_grad()
def evaluate(classifier: Classifier, texts: Examples[Batch]) -> Evaluation:
    """Loss and accuracy over all texts."""
    loss, right = 0.0, 0
    for batch in texts.in_order_of_length(_EVALUATION_BATCH):
        logits = classifier(batch.input_ids, batch.attention_mask)
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += int((logits.argmax(1) == batch.labels).sum())
    return Evaluation(loss / len(texts), right / len(texts))


def classifier_learner(
    config: Config, device: torch.device, dtype: torch.dtype, begun: Path | None
) -> ClassifierLearner:
    """Data, encoder and head.

    Args:
        config: of the run.
        device: for model and batches.
        dtype: of the weights.
        begun: the folder of a run that has begun, whose head is taken; None for a head of its own.

    Raises ValueError, TypeError or OSError for settings, data or a model that cannot be used.
    """
    if config.data is None:
        data = stdlib_docstrings(seed=config.seed)
    else:
        data = from_tables(config.data, config.test_data, seed=config.seed)
    assert config.max_tokens is not None
    max_tokens = config.max_tokens
    encoder, tokenizer, hidden_size = load_encoder(pretrained(config), dtype)
    classifier = Classifier(encoder, hidden_size, len(data.names)).to(device=device, dtype=dtype).eval()

    def tokenize(split: Split) -> Texts:
        return Texts.tokenize(tokenizer, split.texts, split.labels, max_tokens, device)

    train, dev, test = tokenize(data.train), tokenize(data.dev), tokenize(data.test)
    train.check_batch_size(config.batch_size)
    if begun is None:
        start_head(classifier, config.head_start, tokenizer, data.names, train, config.shots)
    else:
        started = load_start(begun, config)
        if started.names != data.names:
            raise ValueError(f"--resume: expected the labels {started.names} in the data, got {data.names}")
        # computed by forwards, whose last bits another machine need not share
        classifier.head.load_state_dict(started.model.head.state_dict())
    freeze(classifier.encoder, config.freeze)
    return ClassifierLearner(TrainedClassifier(classifier, tokenizer, data.names, max_tokens), train, dev, test, device)


def pretrained(config: Config) -> str:
    """Folder or hub id of the run's encoder."""
    return config.model or str(minilm_folder())


def load_start(folder: Path, config: Config) -> TrainedClassifier:
    """What a run started with, on the CPU."""
    return _load(folder / START, pretrained(config))


def load_classifier(run: str | Path) -> TrainedClassifier:
    """The classifier that a run saved in its folder, on the CPU, in evaluation mode and in its own dtype.

    Raises FileNotFoundError if the folder has no finished run, ValueError if the run learned a task with prompts.
    """
    if "task" in run_folder.description(run):
        raise ValueError(f"{run}: expected a run that trained a classifier, got one with prompts: use load_prompted")
    return _load(Path(run) / MODEL, str(Path(run) / MODEL))


def _load(folder: Path, model: str) -> TrainedClassifier:
    """The head in a folder, on the encoder of `model`."""
    from safetensors.torch import load_file

    labels = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    head = load_file(folder / _HEAD)
    encoder, tokenizer, hidden_size = load_encoder(model, head["weight"].dtype)
    classifier = Classifier(encoder, hidden_size, len(labels["names"])).to(head["weight"].dtype)
    classifier.head.load_state_dict(head)
    return TrainedClassifier(classifier.eval(), tokenizer, tuple(labels["names"]), labels["max_tokens"])
