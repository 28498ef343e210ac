"""Train a classifier, save it, load it and use it on texts."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_kernels import checks, files
from zo_kernels.finetune.classifier.batches import Batch, Texts
from zo_kernels.finetune.classifier.model import Classifier, load_encoder, start_head
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.data import tables
from zo_kernels.finetune.data.examples import Examples
from zo_kernels.finetune.data.splits import Split, TextData, from_tables, with_test
from zo_kernels.finetune.docstrings import stdlib_docstrings
from zo_kernels.finetune.folders import run_folder, schema
from zo_kernels.finetune.folders.metrics import Evaluation
from zo_kernels.finetune.folders.run_folder import MODEL, START, Description
from zo_kernels.finetune.learner import Learner, Predictor, checked_rows, no_bar, warn_of_cut
from zo_kernels.finetune.pretrained import check_max_tokens, freeze, minilm_folder, no_progress_bars

_HEAD = "head.safetensors"
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class TrainedClassifier(Predictor):
    """A classifier with its tokenizer and labels, ready for texts."""

    model: Classifier
    tokenizer: Any
    names: tuple[str, ...]
    max_tokens: int

    @torch.no_grad()
    def predict(self, texts: Iterable[str]) -> list[str]:
        """The most likely label of each text, in the same order. Warns if texts had to be cut.

        Raises:
            TypeError: `texts` is a single text, or an element is not a text.
            ValueError: a text is blank.
        """
        texts = checked_rows(texts, "texts")
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"predict: text {at}: expected a text, got {reprlib.repr(text)}")
            if not text.strip():
                raise ValueError(f"predict: text {at}: expected a text with words, got {text!r}")
        if not texts:
            return []
        device = self.model.head.weight.device
        tokenized = Texts.tokenize(self.tokenizer, texts, range(len(texts)), self.max_tokens, device)
        warn_of_cut(tokenized.cut, len(texts), self.max_tokens)
        found = [""] * len(texts)
        for batch in tokenized.in_order_of_length(_EVALUATION_BATCH):
            chosen = self.model(batch.input_ids, batch.attention_mask).argmax(1).tolist()
            for at, label in zip(batch.labels.tolist(), chosen, strict=True):
                found[at] = self.names[label]
        return found

    def save_start(self, folder: Path) -> None:
        self._save_head(folder / START)

    def _write(self, target: Path) -> None:
        with no_progress_bars():
            self.model.encoder.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        self._save_head(target)

    def _save_head(self, target: Path) -> None:
        from safetensors.torch import save

        target.mkdir(parents=True, exist_ok=True)
        head = {name: value.contiguous() for name, value in self.model.head.state_dict().items()}
        files.replace(target / _HEAD, save(head))
        run_folder.write_description(target, Description(self.names, self.max_tokens))


@dataclass(frozen=True)
class ClassifierLearner(Learner):
    """Trains a classifier on the mean cross-entropy; measures the loss and the accuracy."""

    predictor: TrainedClassifier
    train: Texts
    dev: Texts
    test: Texts
    device: torch.device
    notes: tuple[str, ...] = ()

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.predictor.model(batch.input_ids, batch.attention_mask), batch.labels)

    def evaluate(self, examples: Examples[Batch], done: Callable[[int], object] = no_bar) -> Evaluation:
        return evaluate(self.predictor.model, examples, done)


@torch.no_grad()
def evaluate(classifier: Classifier, texts: Examples[Batch], done: Callable[[int], object] = no_bar) -> Evaluation:
    """Mean loss and accuracy over all texts. After each batch `done` is called with the number of its texts."""
    loss, right = 0.0, 0
    for batch in texts.in_order_of_length(_EVALUATION_BATCH):
        logits = classifier(batch.input_ids, batch.attention_mask)
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += int((logits.argmax(1) == batch.labels).sum())
        done(len(batch.labels))
    return Evaluation(loss / len(texts), right / len(texts))


def classifier_learner(
    config: Config, device: torch.device, dtype: torch.dtype, begun: Path | None
) -> ClassifierLearner:
    """Load the data and the encoder, and initialise the head.

    Args:
        config: the settings of the run.
        device: of the model and the batches.
        dtype: of the weights.
        begun: the folder of a run that has begun, to use the head it started with; None for a new head.

    Raises ValueError, TypeError or OSError if the settings, the data or the model cannot be used.
    """
    if config.data is None:
        data = with_test(stdlib_docstrings(seed=config.seed), config.test_examples)
    else:
        data = from_tables(config.data, config.test_data, seed=config.seed, test_examples=config.test_examples)
    assert config.max_tokens is not None
    max_tokens = config.max_tokens
    encoder, tokenizer, hidden_size = load_encoder(pretrained(config), dtype)
    check_max_tokens(encoder, max_tokens)
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
            raise ValueError(
                f"--resume: expected the labels that the run began with, {started.names}, got {data.names} in the data"
            )
        # Not computed again: on another machine the last bits of a forward may differ.
        classifier.head.load_state_dict(started.model.head.state_dict())
    freeze(classifier.encoder, config.freeze)
    predictor = TrainedClassifier(classifier, tokenizer, data.names, max_tokens)
    notes = (*data.notes, *_unreadable(tokenizer, data, (train, dev, test)))
    return ClassifierLearner(predictor, train, dev, test, device, notes)


def _unreadable(tokenizer: Any, data: TextData, splits: tuple[Texts, ...]) -> Iterator[str]:
    """A note if the tokenizer knows no word of some texts. The model cannot tell such texts apart."""
    said, special = tables.Count(), set(tokenizer.all_special_ids)
    for split, tokenized in zip((data.train, data.dev, data.test), splits, strict=True):
        for text, ids in zip(split.texts, tokenized.ids, strict=True):
            if special.issuperset(ids.tolist()):
                said(reprlib.repr(text))
    yield from said.told("the tokenizer knows no word of 1 text", "the tokenizer knows no word of {} texts")


def pretrained(config: Config) -> str:
    """Folder or hub id of the encoder that the run starts from."""
    return config.model or str(minilm_folder())


def load_start(folder: Path, config: Config) -> TrainedClassifier:
    """The classifier that a run started with, on the CPU."""
    return _load(folder / START, run_folder.read_description(folder / START), pretrained(config))


def load_classifier(run: str | Path) -> TrainedClassifier:
    """Load the classifier that a finished run saved: on the CPU, in evaluation mode, in the dtype it was trained in.

    `load_classifier(run).predict(["a text", ...])` returns the label of each text.

    Raises FileNotFoundError if the folder has no finished run, ValueError if the run learned a task with prompts or its
    model is damaged.
    """
    about = run_folder.description(run)
    if about.task is not None:
        raise ValueError(f"{run}: expected a run that trained a classifier, got one with prompts: use load_prompted")
    with run_folder.model_of(run):
        return _load(Path(run) / MODEL, about)


def _load(folder: Path, about: Description, model: str | None = None) -> TrainedClassifier:
    """The head in `folder` on the encoder `model`; None takes the encoder from the folder, too, with all its weights.

    Raises ValueError or OSError if head and encoder do not fit.
    """
    head = _load_head(folder / _HEAD)
    dtype = head["weight"].dtype
    encoder, tokenizer, hidden_size = load_encoder(model or str(folder), dtype, whole=model is None)
    for name, shape in (("weight", (len(about.names), hidden_size)), ("bias", (len(about.names),))):
        if (got := tuple(head[name].shape)) != shape:
            raise ValueError(
                f"{folder / _HEAD}: {name}: expected the shape {shape}, given by the labels and the encoder, got {got}"
            )
    classifier = Classifier(encoder, hidden_size, len(about.names)).to(dtype)
    classifier.head.load_state_dict(head)
    return TrainedClassifier(classifier.eval(), tokenizer, about.names, about.max_tokens)


def _load_head(path: Path) -> dict[str, Tensor]:
    """The tensors of a head. Raises ValueError or OSError if the file cannot be read or holds something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    schema.check_file(path)
    try:
        head = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file with the head: {error}") from error
    types = {value.dtype for value in head.values()}
    if head.keys() != {"weight", "bias"} or len(types) > 1 or not types <= set(checks.DTYPES):
        told = {name: str(value.dtype) for name, value in list(head.items())[:4]}
        raise ValueError(f"{path}: expected weight and bias in one of {checks.DTYPES}, got {told}")
    return head
