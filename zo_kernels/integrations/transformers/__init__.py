"""A drop-in `transformers.Trainer` that trains with forward passes only.

    from zo_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments
    args = ZOTrainingArguments(output_dir="runs/mine", method="mezo", learning_rate=1e-6, max_steps=2000)
    ZOTrainer(model=model, args=args, train_dataset=train, eval_dataset=dev).train()

Needs transformers and accelerate (`pip install zo_kernels[trainer]`); the rest of zo_kernels does not. docs/trainer.md
explains every option.

    arguments, trainer        `ZOTrainingArguments` and `ZOTrainer`
    optimizers                makes the optimizer, and schedules its learning rates
    losses, objectives        what a step minimises
    precision, evaluation     float32 losses for 16-bit models; forwards without dropout
    reading, draws, anchors   training batches that a resumed run reads again, bit for bit
    resumed, checkpoints      what a checkpoint holds, and how a run goes on from it
    refusals, card            when to give up; what the model card says
"""

from zo_kernels.integrations.transformers.arguments import ZOTrainingArguments
from zo_kernels.integrations.transformers.refusals import Diverged
from zo_kernels.integrations.transformers.trainer import ZOTrainer

__all__ = ["Diverged", "ZOTrainer", "ZOTrainingArguments"]
