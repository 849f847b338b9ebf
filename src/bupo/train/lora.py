"""Low-rank adapters (LoRA, arXiv 2106.09685), also over a frozen model in 4 bits (QLoRA, arXiv 2305.14314)."""

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
from bupo.models.load import accelerator, load_model
from bupo.recipe import Recipe
from bupo.train.config import engine

SOURCE = {"dtype", "revision", "trust_remote_code"}  # keys of a recipe that say how its model is loaded


def lora_config(recipe: Recipe) -> LoraConfig | None:
    """PEFT's configuration of a recipe's adapters, or None without them."""
    if (lora := recipe.lora) is None:
        return None
    return LoraConfig("CAUSAL_LM", r=lora.r, target_modules=lora.target_modules, lora_alpha=lora.alpha,
                      lora_dropout=lora.dropout)  # fmt: skip


def load_in_4bit(recipe: Recipe, settings: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that hold linear weights in 4 bits (nf4, scales quantised too), if asked for.

    Embedding, unembedding and norms keep the recipe's ``dtype``. Every process loads the model where it will train, as
    it cannot be moved. Raises `ConfigError` without bitsandbytes, and under FSDP or DeepSpeed.
    """
    if recipe.lora is None or not recipe.lora.four_bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.four_bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if engine(settings) not in ("one", "ddp"):
        raise ConfigError("lora.four_bit needs one process or DDP: FSDP and DeepSpeed would split packed weights")
    place = int(os.environ.get("LOCAL_RANK", "0")) if accelerator() else "cpu"
    nf4: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4["bnb_4bit_compute_dtype"] = torch.bfloat16 if settings.bf16 else torch.float32
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": place}}


def check_lora(model: nn.Module) -> None:
    """Raise `ConfigError` for adapters that could not be merged into one model at the end of the run, or are none."""
    if not isinstance(model, PeftModel):
        return
    names: Any = model.active_peft_config.target_modules
    adapted: Any = model.base_model.targeted_module_names
    for name in names if isinstance(names, list | set) else ():  # PEFT complains only if it finds none of them
        if not any(one == name or one.endswith(f".{name}") for one in adapted):
            raise ConfigError(f"lora.target_modules: the model has no module {name!r} that could get an adapter")
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = None not in ends and ends[0].weight is ends[1].weight
    if tied and any(isinstance(end, BaseTunerLayer) for end in ends):
        what = "lora.target_modules names an embedding that is tied to the unembedding"
        raise ConfigError(f"{what}: merging its adapter would change both; leave it out")
    if is_deepspeed_zero3_enabled():
        raise ConfigError("lora cannot be merged under DeepSpeed ZeRO-3; use ZeRO-2, FSDP2 or DDP")


def upcast_adapters(model: nn.Module) -> None:
    """Turn adapters over a quantised model to float32: TRL makes them bfloat16, which rounds away steps of 1e-6."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def merge_adapters(model: PeftModel, adapter: Path, recipe: Recipe, *, sharded: bool) -> Any:
    """The policy that was trained as one model without adapters, made by the main process alone.

    A merge in place would need every process for ``sharded`` weights, and would round the sum of 4-bit ones. There the
    saved ``adapter`` is merged into the base model, loaded again or dequantised. The sum is in float32: 16 bits would
    round most of an adapter away.
    """
    if sharded:
        source = recipe.model_dump(include=SOURCE) | {"dtype": "float32"}
        base: Any = load_model(recipe.model, device="cpu", **source)[0]
    elif getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        base = model.unload().dequantize().to("cpu", torch.float32)
    else:
        wide = model.dtype == torch.float32
        return (model if wide else model.to("cpu", torch.float32)).merge_and_unload()
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
