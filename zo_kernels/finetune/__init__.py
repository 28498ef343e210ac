"""`zo-finetune`: fine-tune a pretrained model with forward passes only, as a text classifier or with prompts.

    from zo_kernels.finetune import Config, finetune, load_classifier, load_prompted
    finetune(Config(steps=200, out="runs/mine"))
    load_classifier("runs/mine").predict(["Wait until the lock is released."])
    finetune(Config(task="sst2", model="facebook/opt-125m", out="runs/sst2"))
    load_prompted("runs/sst2").predict([{"sentence": "It moves at the pace of a glacier."}])

What is in this room:

    cli, options   the command line and its options
    config         the settings of a run, checked
    ending         the last line of a command that was stopped: what is safe, how to continue
    data/          tables that users bring, splits, examples and batches
    docstrings     the default data set
    pretrained     the default model, and helpers for all pretrained models
    learner        the protocol of what a run trains
    classifier/    trains an encoder with a linear head: `load_classifier`
    tasks          the tasks that are learned with prompts, as data
    prompts/       trains a language model on a task: `load_prompted`
    folders/       what a run writes to disk: settings, metrics, locks
    runs/          one run from start to end, resuming, `zo-finetune replay`: `finetune`
    sweeps/        several runs over learning rates and perturbation scales: `zo-finetune sweep`

Needs transformers, rich, matplotlib and safetensors, and datasets for tasks with prompts. The rest of zo_kernels does
not need them.
"""

from zo_kernels.finetune.classifier.learner import load_classifier
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.folders.metrics import Summary
from zo_kernels.finetune.prompts.predictor import load_prompted
from zo_kernels.finetune.runs.train import finetune

__all__ = ["Config", "Summary", "finetune", "load_classifier", "load_prompted"]
