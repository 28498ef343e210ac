"""Teach OPT the sentiment of SST-2's sentences by a prompt, with all weights: python examples/opt_sst2.py"""

from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from zo_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments

WORDS = (" terrible", " great")  # of the labels 0 and 1


def main(model: str = "facebook/opt-125m", data: str = "stanfordnlp/sst2", **options: Any) -> dict[str, float]:
    """Train on `data`, a data set with sentences and labels; returns the metrics of the best checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def prompt(row: dict[str, Any]) -> dict[str, list[int]]:
        ids = tokenizer(row["sentence"].strip() + " It was").input_ids
        (word,) = tokenizer(WORDS[row["label"]], add_special_tokens=False).input_ids
        return {"input_ids": [*ids, word], "labels": [-100] * len(ids) + [word]}

    examples = {name: rows.map(prompt, remove_columns=rows.column_names) for name, rows in load_dataset(data).items()}
    settings = {
        "output_dir": "runs/opt-sst2", "learning_rate": 1e-6, "lr_scheduler_type": "constant", "max_steps": 5000,
        "per_device_train_batch_size": 16, "eval_strategy": "steps", "eval_steps": 500, "load_best_model_at_end": True,
    }  # fmt: skip
    trainer = ZOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=ZOTrainingArguments(**{**settings, **options}),
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the labels, too
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
