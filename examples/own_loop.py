"""A loop of your own over a language model, that survives kills: python examples/own_loop.py, again and again"""

from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo_kernels as zo


def main(
    model: str = "facebook/opt-125m", data: str = "stanfordnlp/sst2", out: str = "runs/own-loop", steps: int = 5000
) -> float:
    """Train on sentences; returns the loss of the last step. Started again, it goes on with the same bits."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    sentences = load_dataset(data)["train"]["sentence"]
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()  # dropout off

    Path(out).mkdir(parents=True, exist_ok=True)
    opt = zo.MeZO(network, lr=1e-6, eps=1e-3)
    opt.resume(f"{out}/trajectory.zo", missing_ok=True)  # from the weights of the first start: the pretrained ones
    loss: Any = float("nan")
    for step in range(opt.step_count, steps):
        rows = torch.randint(len(sentences), (16,), generator=torch.Generator().manual_seed(step))
        batch = tokenizer([sentences[i] for i in rows.tolist()], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = opt.step(lambda batch=batch, labels=labels: network(**batch, labels=labels).loss)
    network.save_pretrained(f"{out}/model")
    return float(loss)


if __name__ == "__main__":
    print(main())
