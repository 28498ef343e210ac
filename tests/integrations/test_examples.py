"""The files of examples/ run, on models and data of a few bytes."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tiny_trainer import seeded

import zo_kernels as zo

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["[PAD]", "[UNK]", "It", "was", "great", "terrible", *"abcdefgh"]
SENTENCES = [(f"{a} {b}", i % 2) for i, (a, b) in enumerate(zip("abcdefgh", "hgfedcba", strict=True))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder that `datasets.load_dataset` reads."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write(folder)


def write(folder: Path) -> str:
    lines = [json.dumps({"sentence": sentence, "label": label}) + "\n" for sentence, label in SENTENCES]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def saved(folder: Path, build: Any) -> str:
    """A random model with a tokenizer of whole words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    seeded(build, 2).save_pretrained(folder)
    return str(folder)


QUIET: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def test_opt_sst2(data: str, tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "opt_sst2.py"))["main"]
    metrics = main(
        saved(tmp_path / "model", models.opt),
        data,
        output_dir=str(tmp_path / "out"),
        eval_steps=1,
        save_steps=1,
        **QUIET,
    )
    assert 2 < metrics["eval_loss"] < 5  # near log 32, that of a model which knows nothing
    assert (tmp_path / "out" / "checkpoint-2" / "trajectory.zo").exists()


def test_lora_llama(data: str, tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "lora_llama.py"))["main"]
    loss = main(
        saved(tmp_path / "model", models.llama),
        data,
        "sentence",
        output_dir=str(tmp_path / "out"),
        save_steps=1,
        **QUIET,
    )
    assert 2 < loss < 5
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_torch_alone() -> None:
    main = runpy.run_path(str(EXAMPLES / "torch_alone.py"))["main"]
    assert main(steps=200) > 0.3  # four classes


def test_own_loop_ends_with_the_same_bits_if_it_is_cut_off(data: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    main = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]
    model = saved(tmp_path / "model", models.opt)
    ends = []
    for folder, starts in (("whole", [4]), ("cut", [2, 4])):
        for steps in starts:
            assert 2 < main(model, data, str(tmp_path / folder), steps) < 5
            assert zo.Trajectory.load(tmp_path / folder / "trajectory.zo").steps == steps
        ends.append(load_file(tmp_path / folder / "model" / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(end, ends[1][name]) for name, end in ends[0].items())


def test_they_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 4
    assert all(len(file.read_text(encoding="utf-8").splitlines()) <= 40 for file in files)
