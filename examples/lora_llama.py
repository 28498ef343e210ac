"""A LoRA adapter for a Llama in bfloat16, trained by forward passes only: python examples/lora_llama.py"""

from typing import Any

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from zo_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments


def main(
    model: str = "TinyLlama/TinyLlama_v1.1", data: str = "tatsu-lab/alpaca", column: str = "text", **options: Any
) -> float:
    """Train on a column of `data`; returns the mean loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = load_dataset(data)["train"]
    examples = texts.map(
        lambda row: tokenizer(row[column], truncation=True, max_length=256), remove_columns=texts.column_names
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    settings = {
        "output_dir": "runs/lora-llama", "learning_rate": 5e-5, "eps": 1e-2, "max_steps": 5000,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    trainer = ZOTrainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16"), lora),
        args=ZOTrainingArguments(**{**settings, **options}),
        train_dataset=examples,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    return trainer.train().training_loss


if __name__ == "__main__":
    print(main())
