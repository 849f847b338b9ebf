"""Tiny runs of transformers' ``Trainer`` and of TRL's trainers, with gradient checkpointing and dropout."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from bupo.callbacks import LayerReadings
from tests.support.lens import pairs
from tests.support.tiny import tiny_model
from tests.support.training import even_share, prompts, same_weights, tiny_tokenizer, weights

KINDS = ("trainer", "sft", "dpo", "grpo")
SETTINGS = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "seed": 3, "save_strategy": "no"}
SETTINGS |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": True}
SETTINGS |= {"ddp_find_unused_parameters": False, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
TEXTS = prompts()["prompt"]
ADAPTERS = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.2)


def trainer_of(kind: str, folder: Path, callbacks: Any = (), *, lora: bool = False, **changes: Any) -> Any:
    """A trainer of a kind in `KINDS`, ready to train."""
    model, settings = tiny_model(spread=3.0, attention_dropout=0.1), {"output_dir": str(folder), **SETTINGS, **changes}
    more: dict[str, Any] = {"model": model, "processing_class": tiny_tokenizer(), "callbacks": [*callbacks]}
    adapters = {"peft_config": copy.deepcopy(ADAPTERS)} if lora else {}
    if kind == "grpo":
        sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
        args = GRPOConfig(**settings, **sizes, beta=0.0)
        return GRPOTrainer(**more, **adapters, args=args, train_dataset=prompts(), reward_funcs=even_share)
    settings["per_device_train_batch_size"] = 2
    if kind == "dpo":
        rows = {"prompt": TEXTS, "chosen": ["w8 w9"] * len(TEXTS), "rejected": ["w5 w7 w9"] * len(TEXTS)}
        reference = {} if lora else {"ref_model": copy.deepcopy(model)}
        args = DPOConfig(**settings)
        return DPOTrainer(**more, **adapters, **reference, args=args, train_dataset=Dataset.from_dict(rows))
    if kind == "sft":
        rows = Dataset.from_dict({"text": TEXTS})
        return SFTTrainer(**more, **adapters, args=SFTConfig(**settings), train_dataset=rows)
    if lora:
        torch.manual_seed(3)
        more["model"] = get_peft_model(model, adapters["peft_config"])
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    rows = Dataset.from_list([{"input_ids": tiny_tokenizer()(text)["input_ids"]} for text in TEXTS])
    return Trainer(**more, args=TrainingArguments(**settings), train_dataset=rows, data_collator=collator)


def two_processes(folder: Path, rank: int) -> None:
    """For every kind: whether the weights are those without readings, and the rows that were logged."""
    torch.set_num_threads(1)
    for kind in KINDS:
        found = []
        for name, callbacks in (("plain", []), ("watched", [LayerReadings(pairs(), every=2)])):
            trainer = trainer_of(kind, folder / kind / name, callbacks)
            trainer.train()
            found.append(weights(trainer.accelerator.unwrap_model(trainer.model)))
        read = [row for row in trainer.state.log_history if "layer_kl/01" in row]
        (folder / f"{kind}-{rank}.json").write_text(json.dumps({"same": same_weights(*found), "read": read}))
