"""`zo-finetune`: fine-tune a pretrained encoder as a text classifier by forward passes only.

    from zo_kernels.finetune import Config, finetune, load_classifier
    summary = finetune(Config(steps=200, out="runs/mine"))
    load_classifier("runs/mine").predict(["Wait until the lock is released."])

Needs transformers, rich, matplotlib and safetensors; the rest of zo_kernels does not.
"""

from zo_kernels.finetune.config import Config
from zo_kernels.finetune.results import Summary
from zo_kernels.finetune.run_folder import load_classifier
from zo_kernels.finetune.train import finetune

__all__ = ["Config", "Summary", "finetune", "load_classifier"]
