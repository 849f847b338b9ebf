"""Low-rank adapters (LoRA, arXiv 2106.09685), also over a frozen model in 4 bits (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bupo.errors import ConfigError
from bupo.recipe import Recipe
from bupo.train.unsupported import engine


def lora_config(recipe: Recipe) -> Any:
    """PEFT's configuration of a recipe's adapters, or None without them."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    lora = recipe.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def four_bit(recipe: Recipe, settings: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that hold the layers' linear weights in 4 bits: nf4, scales quantised too.

    The unembedding, the embedding and the norms keep the recipe's ``dtype``; products are in bfloat16 where training
    is. A quantised model cannot be moved, so every process loads it where it will train.

    Args:
        settings: the trainer's, which know what spreads the model (a launcher may say so, not the recipe).

    Raises:
        ConfigError: bitsandbytes is not installed, or the run is split by FSDP or DeepSpeed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.four_bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if engine(settings) not in ("one", "ddp"):
        raise ConfigError("lora.four_bit is for one process or DDP: FSDP and DeepSpeed would split packed weights")
    from transformers import BitsAndBytesConfig

    accelerator = torch.accelerator.is_available()
    mixed = recipe.precision == "bfloat16" or (recipe.precision == "auto" and accelerator)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if mixed else torch.float32,
        ),
        "device_map": {"": int(os.environ.get("LOCAL_RANK", "0")) if accelerator else "cpu"},
    }


def keep_adapters_precise(model: nn.Module) -> None:
    """Adapters over a quantised model in float32: TRL makes them bfloat16, where steps of 1e-6 are rounded away."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def merged(wrapped: Any, adapter: Path) -> Any:
    """The policy as one model without adapters.

    Over 4 bits, a merge in place would round the sum to 4 bits again. There the adapters (saved in ``adapter``) are
    merged into the dequantised weights: the policy that was trained, at full size.
    """
    if not getattr(wrapped.get_base_model(), "is_loaded_in_4bit", False):
        return wrapped.merge_and_unload()
    from peft import PeftModel

    base = wrapped.unload().dequantize()
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
