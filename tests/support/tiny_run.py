"""A random encoder and a table of texts, small enough for whole runs of zo-finetune in a test."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = {"fruit": ["apple", "pear", "plum", "fig"], "metal": ["iron", "zinc", "tin", "lead"]}


def tiny_encoder(folder: Path) -> Path:
    """A random BERT of two layers and its tokenizer, written to a folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "of", *WORDS, *(w for group in WORDS.values() for w in group)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=16, **shape)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_table(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Distinct texts of five words of their label."""
    draw = random.Random(seed)
    rows = {(label, " ".join(draw.choices(WORDS[label], k=5))) for label in WORDS for _ in range(count)}
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in sorted(rows)), encoding="utf-8")
    return path


def tiny_options(encoder: Path, table: Path) -> dict[str, object]:
    """Settings of a run of a second, all but its folder."""
    return {
        "model": str(encoder), "data": str(table), "head_start": "few-shot", "shots": 2,
        "steps": 6, "eval_every": 3, "batch_size": 8, "max_tokens": 8, "threads": 1,
    }  # fmt: skip


def whole_run(options: dict[str, object], resume: bool) -> None:
    """Run or resume, without a picture."""
    from rich.console import Console

    from zo_kernels.finetune import Config
    from zo_kernels.finetune.runs import report, train

    report.draw_curves = lambda records, path: None  # takes longer than all the rest
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere)
        train.resume(str(options["out"]), console) if resume else train.finetune(Config(**options), console)


def cut_off(options: dict[str, object], monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """A run that dies after so many steps; its folder."""
    from rich.console import Console

    from zo_kernels.finetune import Config
    from zo_kernels.finetune.runs import train

    step = train.Stepper.step

    def dying(stepper: train.Stepper, factor: float) -> object:
        if stepper._optimizer.step_count == after:
            raise InterruptedError
        return step(stepper, factor)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(train.Stepper, "step", dying)
        train.finetune(Config(**options), Console(quiet=True))
    return Path(str(options["out"]))


def tree(folder: Path) -> dict[str, object]:
    """All that is in it."""
    result: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        result[str(path.relative_to(folder))] = os.readlink(path) if path.is_symlink() else (
            path.read_bytes() if path.is_file() else None
        )  # fmt: skip
    return result


def rewrite(path: Path, **changes: Any) -> None:
    """Fields of a JSON object; those that are None are taken out."""
    values = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}), encoding="utf-8")
