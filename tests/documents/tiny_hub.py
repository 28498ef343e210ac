"""A folder in which the names of models and data sets on the hub are folders, of random models and made-up rows.

transformers and datasets look for a folder of that name first, so programs that run in it need no network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_tasks
import torch

TASKS = {"stanfordnlp/sst2": ("sst2",), "aps/super_glue": ("rte", "cb", "boolq", "wic", "copa")}


def fill(folder: Path) -> Path:
    """Write all of it."""
    models: dict[str, Callable[[Path], Any]] = {
        "facebook/opt-125m": tiny_tasks.tiny_opt,
        "facebook/opt-13b": tiny_tasks.tiny_opt,
        "roberta-large": tiny_tasks.tiny_roberta,
        "MODEL_FOLDER_OR_HUB_ID": encoder,
    }
    for name, write in models.items():
        (folder / name).mkdir(parents=True)
        write(folder / name)
        look_trained(folder / name / "model.safetensors")
    (folder / "PATH").mkdir()  # of another package's code
    for name, tasks in TASKS.items():
        lines = ["configs:"]
        for task in tasks:
            rows = folder / name / task if len(tasks) > 1 else folder / name
            rows.parent.mkdir(parents=True, exist_ok=True)
            tiny_tasks.write_rows(rows, task)
            lines += [f"- config_name: {task}", f"  data_dir: {task}"]
        if len(tasks) > 1:
            (folder / name / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    return folder


def look_trained(path: Path) -> None:
    """Biases and norms that are not all alike."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def encoder(folder: Path) -> Path:
    """A BERT of two layers, for texts of any kind."""
    import transformers

    size = len(tiny_tasks.byte_tokenizer(folder))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder
