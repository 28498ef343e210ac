"""A drop-in `transformers.Trainer` that trains by forward passes only.

    from zo_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments
    args = ZOTrainingArguments(output_dir="runs/mine", method="mezo", learning_rate=1e-6, max_steps=2000)
    ZOTrainer(model=model, args=args, train_dataset=train, eval_dataset=dev).train()

Needs transformers and accelerate (`pip install zo_kernels[trainer]`); the rest of zo_kernels does not. docs/trainer.md
says what each option means.
"""

from zo_kernels.integrations.transformers.arguments import ZOTrainingArguments
from zo_kernels.integrations.transformers.refusals import Diverged
from zo_kernels.integrations.transformers.trainer import ZOTrainer

__all__ = ["Diverged", "ZOTrainer", "ZOTrainingArguments"]
