"""What a run leaves behind in its folder, from which it can be resumed, replayed and used.

config.json, start/ (all that the pretrained model does not hold: head, labels), trajectory.zo, metrics.jsonl; when it
has finished also curves.png and model/.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from zo_kernels.finetune.batches import Texts
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.model import Classifier, load_encoder, no_progress_bars

CONFIG, METRICS, CURVES, MODEL = "config.json", "metrics.jsonl", "curves.png", "model"
START, TRAJECTORY = "start", "trajectory.zo"
_HEAD, LABELS = "head.safetensors", "labels.json"
_PART = ".part"  # ends the name of a file until it is whole


def create(config: Config) -> Path:
    """Make the folder `config.out` and write the settings into it.

    Raises ValueError if it is a file, or holds anything and `config.overwrite` is not set. To overwrite means to
    replace the files of a run; other files stay.
    """
    folder = empty(str(config.out), "--out", overwrite=config.overwrite, hint=" (or add --overwrite)")
    # What is left of another run must not be taken for this one's.
    for old in (TRAJECTORY, METRICS, f"{START}/{LABELS}", f"{MODEL}/{LABELS}"):
        (folder / old).unlink(missing_ok=True)
    _write_whole(folder / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return folder


def empty(path: str, option: str, *, overwrite: bool = False, hint: str = "") -> Path:
    """The folder, made if need be. Raises ValueError if it is a file, or neither empty nor to be overwritten.

    A file that a killed run had only begun to write is no file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option}: expected a folder, got the file {folder}")
    if folder.is_dir() and not overwrite and any(not file.name.endswith(_PART) for file in folder.iterdir()):
        raise ValueError(f"{option}: expected an empty or new folder, got {folder} with files in it{hint}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def config_of(run: str | Path) -> Config:
    """The settings that a run was started with, `out` being where its folder is now.

    Raises ValueError if the folder has none.
    """
    if Path(run).is_dir() and not (Path(run) / CONFIG).exists():
        raise ValueError(f"{run}: expected the folder of a run, got one without {CONFIG}: no run has begun in it")
    try:
        settings = json.loads((Path(run) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run}: expected the folder of a run, with its {CONFIG}: {error}") from error
    known = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(settings, dict) or not settings.keys() <= known:
        raise ValueError(f"{run}: expected the settings of a run of this version in {CONFIG}")
    return Config(**{**settings, "out": str(run)})


def _write_whole(path: Path, text: str) -> None:
    """All or nothing, whenever the process dies."""
    part = path.with_name(path.name + _PART)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Metrics:
    """Records, one JSON object a line; kept in `records` for the curves. A context manager.

    Args:
        folder: of the run.
        upto: keep the file's whole records, but for those of later steps and a summary; None to begin a new file.
    """

    def __init__(self, folder: Path, upto: int | None = None) -> None:
        path = folder / METRICS
        self.records: list[dict[str, Any]] = []
        if upto is not None and path.exists():
            self.records = [
                r for r in map(_parse, path.read_text(encoding="utf-8", errors="replace").splitlines()) if r
            ]
            self.records = [r for r in self.records if r.get("event") != "summary" and r.get("step", 0) <= upto]
            _write_whole(path, "".join(json.dumps(r) + "\n" for r in self.records))
        self._file = path.open("w" if upto is None else "a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # for those who watch the file, and so that a run that is cut off leaves what it did

    def find(self, event: str, **values: Any) -> dict[str, Any] | None:
        """The last record of an event with these values."""
        wanted = {"event": event, **values}.items()
        return next((r for r in reversed(self.records) if wanted <= r.items()), None) if self.records else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # cut off
        return None
    return record if isinstance(record, dict) and "event" in record else None


def save_start(folder: Path, classifier: Classifier, names: tuple[str, ...], max_tokens: int) -> None:
    """Write what a run starts with and the pretrained model does not hold."""
    _save_head(folder / START, classifier, names, max_tokens)


def load_start(folder: Path, model: str) -> TrainedClassifier | None:
    """What a run started with, on the CPU; `model` is its encoder's folder or id. None if it did not get so far."""
    return _load(folder / START, model) if (folder / START / LABELS).is_file() else None


def save_classifier(
    folder: Path, classifier: Classifier, tokenizer: Any, names: tuple[str, ...], max_tokens: int
) -> None:
    """Write encoder, tokenizer, head and label names to `folder/model`; weights as safetensors in their own dtype."""
    target = folder / MODEL
    with no_progress_bars():
        classifier.encoder.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _save_head(target, classifier, names, max_tokens)


def _save_head(target: Path, classifier: Classifier, names: tuple[str, ...], max_tokens: int) -> None:
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in classifier.head.state_dict().items()}, target / _HEAD)
    labels = {"names": list(names), "max_tokens": max_tokens}
    _write_whole(target / LABELS, json.dumps(labels, indent=2) + "\n")  # last: whoever finds it finds all


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
    folder = Path(run) / MODEL
    if not (folder / LABELS).is_file():
        raise FileNotFoundError(f"{run}: expected the folder of a finished run, got none with {MODEL}/{LABELS}")
    return _load(folder, str(folder))


def _load(folder: Path, model: str) -> TrainedClassifier:
    """The head in a folder, on the encoder of `model`."""
    from safetensors.torch import load_file

    labels = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    head = load_file(folder / _HEAD)
    encoder, tokenizer, hidden_size = load_encoder(model, head["weight"].dtype)
    classifier = Classifier(encoder, hidden_size, len(labels["names"])).to(head["weight"].dtype)
    classifier.head.load_state_dict(head)
    return TrainedClassifier(classifier.eval(), tokenizer, tuple(labels["names"]), labels["max_tokens"])
