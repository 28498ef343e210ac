"""What a run leaves behind: config.json, metrics.jsonl, curves.png and model/, from which it can be loaded again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from zo_kernels.finetune.batches import Texts
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.model import Classifier, load_encoder, no_progress_bars

CONFIG, METRICS, CURVES, MODEL = "config.json", "metrics.jsonl", "curves.png", "model"
_HEAD, _LABELS = "head.safetensors", "labels.json"


def create(config: Config) -> Path:
    """Make the folder `config.out` and write the settings into it.

    Raises ValueError if it is a file, or holds anything and `config.overwrite` is not set. Nothing is deleted:
    to overwrite means to replace the files of a run.
    """
    folder = Path(str(config.out))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise ValueError(f"--out: expected an empty or new folder, got {folder} with files in it (or add --overwrite)")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    return folder


class Metrics:
    """Records, one JSON object a line; kept in `records` for the curves. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._file = (folder / METRICS).open("w", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # for those who watch the file, and so that a run that is cut off leaves what it did

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def save_classifier(
    folder: Path, classifier: Classifier, tokenizer: Any, names: tuple[str, ...], max_tokens: int
) -> None:
    """Write encoder, tokenizer, head and label names to `folder/model`; weights as safetensors in their own dtype."""
    from safetensors.torch import save_file

    target = folder / MODEL
    with no_progress_bars():
        classifier.encoder.save_pretrained(target)
    tokenizer.save_pretrained(target)
    save_file({name: value.contiguous() for name, value in classifier.head.state_dict().items()}, target / _HEAD)
    labels = {"names": list(names), "max_tokens": max_tokens}
    (target / _LABELS).write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TrainedClassifier:
    """A fine-tuned classifier with everything needed to use it on text."""

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


def load_classifier(run: str | Path) -> TrainedClassifier:
    """The classifier that a run saved in its folder, on the CPU, in evaluation mode and in its own dtype.

    Raises FileNotFoundError if the folder has no finished run.
    """
    from safetensors.torch import load_file

    folder = Path(run) / MODEL
    if not (folder / _LABELS).is_file():
        raise FileNotFoundError(f"{run}: expected the folder of a finished run, got none with {MODEL}/{_LABELS}")
    labels = json.loads((folder / _LABELS).read_text(encoding="utf-8"))
    head = load_file(folder / _HEAD)
    encoder, tokenizer, hidden_size = load_encoder(str(folder), head["weight"].dtype)
    classifier = Classifier(encoder, hidden_size, len(labels["names"])).to(head["weight"].dtype)
    classifier.head.load_state_dict(head)
    return TrainedClassifier(classifier.eval(), tokenizer, tuple(labels["names"]), labels["max_tokens"])
