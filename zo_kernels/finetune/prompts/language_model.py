"""Load causal and masked language models with their own heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zo_kernels.finetune.pretrained import ensure_padding, no_progress_bars, positions

_MOST_TOKENS = 2048  # of a prompt, unless --max-tokens says otherwise; as in MeZO


def load_language_model(model: str, kind: str, dtype: torch.dtype | str) -> tuple[nn.Module, Any, str]:
    """Load a model from a folder or a hub id. Returns it in evaluation mode, with its tokenizer and its kind.

    Args:
        model: the folder or id.
        kind: "causal", "masked", or "auto" to read the kind from the model's configuration.
        dtype: of the weights; "auto" keeps the dtype they were saved in.

    Raises:
        ValueError: transformers cannot load the model, or it has no language model head.
    """
    import transformers

    try:
        with no_progress_bars():
            config = transformers.AutoConfig.from_pretrained(model)
            kind = _kind(config, kind)
            family = {"causal": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM}[kind]
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            loaded, report = family.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model: expected a folder or hub id of a {'causal or masked' if kind == 'auto' else kind} language "
            f"model that transformers can load, got {model!r}: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"--model: expected a {kind} language model, got {model!r}, which lacks the weights {missing}; "
            "choose another kind with --model-kind"
        )
    ensure_padding(tokenizer, model)
    return loaded.eval(), tokenizer, kind


def tokens_allowed(model: Any, tokenizer: Any, wanted: int | None) -> int:
    """The longest prompt in tokens: `wanted`, or else what the model can read, at most 2048.

    Raises ValueError if the model cannot read `wanted` tokens.
    """
    most = min(positions(model) or _MOST_TOKENS, tokenizer.model_max_length)
    if wanted is not None and wanted > most:
        raise ValueError(f"--max-tokens: expected at most {most}, as many as the model can read, got {wanted}")
    return min(most, _MOST_TOKENS) if wanted is None else wanted


def _kind(config: Any, wanted: str) -> str:
    """The kind that is wanted or, for "auto", was trained. Raises ValueError if the model does not have it."""
    from transformers.models.auto import modeling_auto

    known = {
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    kinds = [] if config.is_encoder_decoder else [kind for kind in known if config.model_type in known[kind]]
    if not kinds or wanted not in ("auto", *kinds):
        raise ValueError(f"{config.model_type} models can be {' or '.join(kinds) or 'neither'}")
    if wanted != "auto":
        return wanted
    architecture = (config.architectures or [""])[0]
    # transformers loads encoders as causal models, too. They were trained as such only if the architecture says so.
    return "causal" if "causal" in kinds and architecture.endswith(("ForCausalLM", "LMHeadModel")) else kinds[0]
