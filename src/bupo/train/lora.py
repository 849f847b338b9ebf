"""Low-rank adapters (LoRA, arXiv 2106.09685), also over a frozen model in 4 bits (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from bupo.errors import ConfigError
from bupo.models.load import load_model
from bupo.recipe import Recipe
from bupo.train.unsupported import engine


def lora_config(recipe: Recipe) -> LoraConfig | None:
    """PEFT's configuration of a recipe's adapters, or None without them."""
    if recipe.lora is None:
        return None
    settings: dict[str, Any] = recipe.lora.model_dump(include={"r", "target_modules"})
    scale: dict[str, Any] = {"lora_alpha": recipe.lora.alpha, "lora_dropout": recipe.lora.dropout}
    return LoraConfig(**settings, **scale, task_type="CAUSAL_LM")


def load_in_4bit(recipe: Recipe, settings: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that hold linear weights in 4 bits (nf4, scales quantised too), if asked for.

    The unembedding, the embedding and the norms keep the recipe's ``dtype``; products are in bfloat16 where training
    is. A quantised model cannot be moved, so every process loads it where it will train.

    Args:
        settings: the trainer's, which know what distributes the model (a launcher may say so, not the recipe).

    Raises:
        ConfigError: bitsandbytes is not installed, or FSDP or DeepSpeed distributes the run.
    """
    if recipe.lora is None or not recipe.lora.four_bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.four_bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if engine(settings) not in ("one", "ddp"):
        raise ConfigError("lora.four_bit needs one process or DDP: FSDP and DeepSpeed would split packed weights")
    place = int(os.environ.get("LOCAL_RANK", "0")) if torch.accelerator.is_available() else "cpu"
    products = torch.bfloat16 if settings.bf16 else torch.float32
    nf4: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": products,
    }
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": place}}


def check_lora(model: nn.Module) -> None:
    """Refuse adapters that could not be merged into one model at the end of the run.

    Raises:
        ConfigError: an adapter on one of two tied matrices (merging would change both), or DeepSpeed ZeRO-3.
    """
    if not isinstance(model, PeftModel):
        return
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[0] is not None and ends[1] is not None and ends[0].weight is ends[1].weight
    if tied and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ConfigError(
            "lora.target_modules names an embedding that is tied to the unembedding: merging its adapter would change "
            "both; leave it out"
        )
    if is_deepspeed_zero3_enabled():
        raise ConfigError("lora cannot be merged under DeepSpeed ZeRO-3; use ZeRO-2, FSDP2 or DDP")


def upcast_adapters(model: nn.Module) -> None:
    """Turn adapters over a quantised model to float32: TRL makes them bfloat16, which rounds away steps of 1e-6."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def merge_adapters(model: PeftModel, adapter: Path, recipe: Recipe, *, sharded: bool) -> Any:
    """The policy that was trained as one model without adapters; needs the main process only.

    Over 4 bits, a merge in place would round the sum to 4 bits again, so the weights are dequantised first.

    Args:
        adapter: the folder in which the adapters were saved.
        sharded: whether each process holds a part of the weights. A merge in place would then need every process, so
            the base model is loaded again.
    """
    if sharded:
        source: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
        base: Any = load_model(recipe.model, dtype=recipe.dtype, device="cpu", **source)[0]
    elif getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        base = model.unload().dequantize()
    else:
        return model.merge_and_unload()
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
