"""`torch.set_default_device` changes nothing of tensors whose device was said."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from default_device import with_and_without
from matrix import BACKENDS, DTYPES, a_pass, assert_same_bits, bits, resolved, table, to

import zo_kernels as zo
from zo_kernels.backends.types import MaskKind
from zo_kernels.finetune.classifier.batches import Texts
from zo_kernels.finetune.prompts.causal import CausalTexts
from zo_kernels.finetune.prompts.masked import MaskedTexts
from zo_kernels.finetune.prompts.render import CausalPrompt, MaskedPrompt
from zo_kernels.finetune.prompts.task_data import Example

CPU = torch.device("cpu")
PACKAGE = Path(zo.__file__).parent
each_backend = pytest.mark.parametrize(("backend", "device"), [("reference", CPU), *BACKENDS], ids=str)


MAKES_A_TENSOR = re.compile(
    r"torch\.(arange|as_tensor|asarray|empty|empty_strided|eye|full|linspace|logspace|ones|rand|randint|randn|randperm"
    r"|scalar_tensor|tensor|tril_indices|triu_indices|zeros)"
)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_new_tensor_says_its_device(path):
    """Where the other tests do not come, on a GPU, too."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and MAKES_A_TENSOR.fullmatch(ast.unparse(call.func)):
            assert "device" in [keyword.arg for keyword in call.keywords], f"line {call.lineno}: {ast.unparse(call)}"


@each_backend
def test_noise(backend, device):
    """Of seeds that no other test has: the specification's numbers are remembered."""

    def make():
        z = zo.noise((5, 7), seed=30, device=device, backend=backend)
        tensors = [torch.linspace(-1, 1, 64, device=device).to(dtype) for dtype in DTYPES]
        masks = [None, 0.5, torch.arange(64, device=device) % 3 == 0]
        options = {"decay": 0.9, "rounding": "stochastic", "backend": backend}
        zo.add_noise_(tensors, [31, 32], [0.1, -0.2], masks=masks, **options)
        return [bits(t) for t in (z, *tensors)]

    assert all(torch.equal(a, b) for a, b in zip(*with_and_without(make), strict=True))


@each_backend
@pytest.mark.parametrize("kind", [MaskKind.RECORD, MaskKind.BITS], ids=lambda k: k.name.lower())
def test_passes(backend, device, kind):
    entries = table(torch.bfloat16, kind, in_place=True, shards=[(64, 0), (5, 2), (64, 8)])

    def make():
        got = to(entries, device)
        resolved(backend, device).prepare(got)(replace(a_pass(2, "stochastic", 0.9), active=[1, 2]))
        return got

    assert_same_bits(*with_and_without(make))


EXAMPLES = [Example({"text": "x" * n}, n % 2) for n in range(1, 9)]


def tokenizer(texts, **options):
    return {"input_ids": [[2, *map(ord, text)] for text in texts]}


tokenizer.pad_token_id = 0
DATA = {
    "classified": lambda: Texts.tokenize(tokenizer, [e.fields["text"] for e in EXAMPLES], [0, 1] * 4, 16, CPU),
    "causal": lambda: CausalTexts.of(
        lambda fields: CausalPrompt([2], [[2, 3, len(fields["text"])], [2, 4]], [2, 1]), EXAMPLES, 0, CPU, False
    ),
    "masked": lambda: MaskedTexts.of(lambda fields: MaskedPrompt([2] * len(fields["text"]), 0), EXAMPLES, 0, CPU),
}


@pytest.mark.parametrize("kind", DATA)
def test_batches_of_examples(kind):
    def make():
        drawn = DATA[kind]().endless(4, torch.Generator().manual_seed(0))
        return [tensor for _ in range(3) for tensor in vars(next(drawn)).values() if isinstance(tensor, torch.Tensor)]

    got, expected = with_and_without(make)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
