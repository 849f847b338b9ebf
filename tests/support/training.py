"""Shared by the training tests: a tiny tokenizer, a reward with signal, and a trainer on a tiny random model."""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, PrinterCallback

from bupo.train.config import BuPOConfig
from bupo.train.trainer import BuPOTrainer
from tests.support.tiny import tiny_model

VOCABULARY = 97


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: ``w3`` is id 3; 0, 1 and 2 are padding, beginning and end."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="w3",
        padding_side="left",
    )


def prompts(n: int = 24) -> Dataset:
    """Prompts of two to four words."""
    rows = [" ".join(f"w{3 + (7 * i + 5 * j) % 90}" for j in range(2 + i % 3)) for i in range(n)]
    return Dataset.from_dict({"prompt": rows})


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward: the share of even tokens."""
    return [sum(t % 2 == 0 for t in ids) / max(len(ids), 1) for ids in completion_ids]


DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "max_steps": 8,
    "internal_layer": 2,
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "seed": 3,
}


def config(folder: Any, kind: type = BuPOConfig, **changes: Any) -> Any:
    settings = {**DEFAULTS, **changes}
    if kind is not BuPOConfig:
        settings = {k: v for k, v in settings.items() if not k.startswith("internal_")}
    return kind(output_dir=str(folder), **settings)


def make_trainer(folder: Any, kind: type = BuPOTrainer, args: Any = None, model: Any = None, **changes: Any) -> Any:
    """A trainer on a tiny random model (4 layers), ready to train."""
    more = {k: changes.pop(k) for k in ("rollout_func", "peft_config", "callbacks", "train_dataset") if k in changes}
    more.setdefault("train_dataset", prompts())
    trainer = kind(
        model=model if model is not None else tiny_model("qwen3", spread=3.0),
        reward_funcs=even_share,
        args=args if args is not None else config(folder, **changes),
        processing_class=tiny_tokenizer(),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def a_copy(model: Any) -> Any:
    return copy.deepcopy(model)


# -- rewards that recipes name ----------------------------------------------------------------------------------------


def digits(completions: list[str], **_: Any) -> list[float]:
    """The share of digits among the characters."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


INTERRUPT_IN_ROLLOUT = [0, 0]  # the rollout batch whose reward presses Ctrl-C (0: none), and how many have been scored


def digits_then_interrupt(completions: list[str], **given: Any) -> list[float]:
    """As `digits`; in one rollout batch somebody presses Ctrl-C."""
    INTERRUPT_IN_ROLLOUT[1] += 1
    if INTERRUPT_IN_ROLLOUT[0] == INTERRUPT_IN_ROLLOUT[1]:
        os.kill(os.getpid(), signal.SIGINT)
    return digits(completions)


def no_memory(completions: list[str], **_: Any) -> list[float]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def much_memory(completions: list[str], **_: Any) -> list[float]:
    """Asks for more memory than any machine has."""
    return torch.empty(1 << 60).tolist()
