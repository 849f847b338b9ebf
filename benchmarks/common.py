"""Models, data and measurements that the benchmarks share; works with older source trees of bupo, too."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from bupo import load_model

VOCABULARY = 151_936
# Settings of GRPOTrainer and BuPOTrainer on the shipped model, except for the number of updates
TRAINING = {
    "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "num_generations": 8,
    "max_completion_length": 40, "learning_rate": 3e-5, "lr_scheduler_type": "constant", "logging_steps": 4,
    "save_strategy": "no", "report_to": [], "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
UPDATES = 4  # per rollout batch


@dataclass
class Pair:
    """A prompt and its response as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


def make_model(
    name: str, *, smollm2: str, dtype: str = "float32", device: str = "cpu", layers: int | None = None
) -> Any:
    """Load ``smollm2`` from its folder, or create ``wide``: random weights, d = 896, a vocabulary of 151,936."""
    if name == "smollm2":
        model, _ = load_model(smollm2, dtype=dtype, device=device)
        model.config.max_position_embeddings = 16_384  # random tokens: what they mean does not matter here
        return model
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(large_vocabulary(layers or 24), dtype=getattr(torch, dtype))
    return model.eval().to(device)


def large_vocabulary(layers: int) -> Qwen2Config:
    """A Qwen2.5-0.5B with ``layers`` layers."""
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip


def responses(count: int, tokens: int, prompt: int = 8) -> list[Pair]:
    """``count`` responses of ``tokens`` random tokens each."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(10, 40_000, (n,), generator=generator).tolist()

    return [Pair(draw(prompt), draw(tokens)) for _ in range(count)]


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    """Arithmetic prompts in the shipped model's format."""
    draw = random.Random(seed).randint
    return [{"prompt": f"({draw(10, 99)}+{draw(10, 99)})*{draw(2, 9)}=\n"} for _ in range(count)]


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that needs no grading."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def synchronize(device: Any) -> None:
    """Wait for the accelerator."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def resident(name: str) -> int:
    """Resident memory of this process in bytes: now (``VmRSS``), or the peak since it was reset (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


def reset_peak() -> int:
    """Reset the peak of resident memory, and return the resident memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def paired_ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """The ratio ``other / one`` of paired measurements: of the medians, and the median and quartiles of the pairs."""
    ratios = [b / a for a, b in zip(one, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "ratio_of_medians": round(statistics.median(other) / statistics.median(one), 4),
        "median_of_pairs": round(middle, 4),
        "quartiles_of_pairs": [round(low, 4), round(high, 4)],
    }


def trained_parameters(model: nn.Module) -> bytes:
    """The bytes of all parameters, to compare two runs."""
    return b"".join(p.detach().cpu().float().numpy().tobytes() for p in model.parameters())
