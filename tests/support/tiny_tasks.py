"""Rows of each task, and random language models that can read them, small enough for whole runs in a test."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

COLOURS = ["red", "green", "blue", "white"]
CONNECTIVES = ["cause", "effect"]


def row_of(task: str, draw: random.Random) -> dict[str, Any]:
    """A random row with the columns of the task's data set."""
    one, two = draw.choice(COLOURS), draw.choice(COLOURS)
    pair = {"premise": f"The hat is {one}.", "hypothesis": f"It is {two}."}
    rows: dict[str, dict[str, Any]] = {
        "sst2": {"sentence": f"a {one} film in {two} ", "label": draw.randrange(2), "idx": 1},
        "rte": {**pair, "label": draw.randrange(2)},
        "cb": {**pair, "label": draw.randrange(3)},
        "boolq": {"passage": f"The hat is {one}.", "question": f"is the hat {two}", "label": draw.randrange(2)},
        "wic": {
            "word": "hat", "sentence1": f"A {one} hat.", "sentence2": f"Hats are {two}.", "label": draw.randrange(2),
        },
        "copa": {
            "premise": f"The hat was {one}.", "choice1": f"I wore {two}.", "choice2": "It fell.",
            "question": draw.choice(CONNECTIVES), "label": draw.randrange(2),
        },
        "squad": {
            "title": "Hats", "context": f"The hat is {one}. It is not {two}.", "question": " What is the hat? ",
            "answers": {"text": [one, f"it is {one}"], "answer_start": [11, 0]},
        },
    }  # fmt: skip
    return rows[task]


def write_rows(folder: Path, task: str, train: int = 32, validation: int = 12) -> Path:
    """Files train.jsonl and validation.jsonl."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(task)
    for split, count in (("train", train), ("validation", validation)):
        lines = [json.dumps(row_of(task, draw)) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def byte_tokenizer(folder: Path, before: str = "", after: str = "") -> Any:
    """Byte-level BPE that knows the prompts' words whole, with special tokens put around a text."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from zo_kernels.finetune.tasks import TASKS

    draw = random.Random(0)
    texts = [text for name in TASKS for _ in range(20) for text in row_of(name, draw).values() if isinstance(text, str)]
    texts += [f" {word.strip()}\n{word.strip()}" for task in TASKS.values() for word in task.causal.words] * 20
    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    mask = AddedToken("<mask>", lstrip=True, special=True)  # as RoBERTa's
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts + [" It was"] * 20,
        trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[mask if token == "<mask>" else token for token in special], show_progress=False,
        ),
    )  # fmt: skip
    if before or after:
        template = f"{before} $A {after}".strip()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, special.index(token)) for token in (before, after) if token]
        )
    result = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", mask_token=mask
    )
    result.save_pretrained(folder)
    return result


def tiny_opt(folder: Path) -> Path:
    """An OPT of two layers, whose tokenizer puts </s> before a text, as OPT's does."""
    import transformers

    size = len(byte_tokenizer(folder, before="</s>"))
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=size, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=2, eos_token_id=2,
        init_std=0.3,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_gpt2(folder: Path) -> Path:
    """A GPT-2 of two layers, whose tokenizer adds no special tokens."""
    import transformers

    size = len(byte_tokenizer(folder))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def tiny_roberta(folder: Path) -> Path:
    """A RoBERTa of two layers that can read 80 tokens."""
    import transformers

    size = len(byte_tokenizer(folder, before="<s>", after="</s>"))
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=81, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def tiny_bert(folder: Path) -> Path:
    """A BERT of two layers with a vocabulary of words in lower case, which lacks "Maybe"."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "terrible", "great", "yes", "no", *COLOURS]
    words += ["it", "was", "is", "the", "a", "hat", "film", "in", ".", "?", ","]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


MODELS = {"opt": tiny_opt, "gpt2": tiny_gpt2, "roberta": tiny_roberta, "bert": tiny_bert}


def prompted_options(model: Path, task: str, data: Path) -> dict[str, Any]:
    """Settings of a run of a second, all but its folder."""
    generating = {"max_new_tokens": 4} if task == "squad" else {}
    return {
        "model": str(model), "task": task, "task_data": str(data), "steps": 6, "eval_every": 3, "batch_size": 4,
        "dev_examples": 8, "threads": 1, "lr": 1e-3, **generating,
    }  # fmt: skip
