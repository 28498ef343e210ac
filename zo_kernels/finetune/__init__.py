"""`zo-finetune`: fine-tune a pretrained model by forward passes only, as a text classifier or with prompts.

    from zo_kernels.finetune import Config, finetune, load_classifier, load_prompted
    finetune(Config(steps=200, out="runs/mine"))
    load_classifier("runs/mine").predict(["Wait until the lock is released."])
    finetune(Config(task="sst2", model="facebook/opt-125m", out="runs/sst2"))
    load_prompted("runs/sst2").predict([{"sentence": "It moves at the pace of a glacier."}])

Needs transformers, rich, matplotlib and safetensors, and datasets for the tasks with prompts; the rest of zo_kernels
does not.
"""

from zo_kernels.finetune.classifier.learner import load_classifier
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.folders.metrics import Summary
from zo_kernels.finetune.prompts.predictor import load_prompted
from zo_kernels.finetune.runs.train import finetune

__all__ = ["Config", "Summary", "finetune", "load_classifier", "load_prompted"]
