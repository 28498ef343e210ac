"""Losses of models in 16 bits are computed from float32 logits: else the projected gradient has a step of about 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

for module in ("transformers", "datasets", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(module)

from tiny_run import tiny_encoder, tiny_options, write_table  # noqa: E402
from tiny_tasks import MODELS, prompted_options, write_rows  # noqa: E402

from zo_kernels.finetune import Config  # noqa: E402
from zo_kernels.finetune.runs.job import prepare  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")

STEPS = 8
LEARNED = {
    "a classifier": ("encoder", None, {}),
    "candidates": ("opt", "sst2", {}),
    "tokens": ("gpt2", "copa", {}),
    "answers": ("opt", "squad", {}),
    "words at the mask": ("roberta", "rte", {}),
    "by an anchor": ("opt", "sst2", {"method": "mezo-svrg", "anchor_every": 2, "anchor_examples": 8}),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("what", LEARNED)
def test_losses_are_of_32_bits(what: str, dtype: str, tmp_path: Path) -> None:
    model, task, more = LEARNED[what]
    if task is None:
        options = tiny_options(tiny_encoder(tmp_path / "model"), write_table(tmp_path / "words.tsv"))
    else:
        options = prompted_options(MODELS[model](tmp_path / "model"), task, write_rows(tmp_path / "rows", task))
    job = prepare(Config(**{**options, **more, "dtype": dtype, "lr": 1e-6, "out": str(tmp_path / "run")}))
    with job.lock:
        batches = job.learner.train.endless(4, torch.Generator().manual_seed(0))
        for batch in (next(batches) for _ in range(STEPS)):
            loss = job.learner.loss(batch)
            assert loss.dtype == torch.float32 and next(job.classifier.parameters()).dtype != torch.float32
            job.optimizer.step(*[lambda batch=batch: job.learner.loss(batch)] * (2 if more else 1))
    losses = torch.tensor([loss for record in job.optimizer.trajectory for loss in record.losses])
    narrow = losses.to(torch.bfloat16 if dtype == "bf16" else torch.float16).float()
    assert (narrow != losses).float().mean() > 0.9  # of those that were rounded to 16 bits it would be none
    gradients = [g for record in job.optimizer.trajectory for g in record.projected_gradients]
    assert 0 not in gradients and len(set(gradients)) == len(gradients) >= STEPS
