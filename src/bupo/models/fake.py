"""Models without numbers, from a configuration alone: torch's fake tensors have shapes, dtypes and lifetimes only."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM

from bupo.errors import InputError
from bupo.models.layout import find_layout
from bupo.models.load import find_on_hub, resolve_model

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"


def read_config(name: str, config_from: Path | None = None, **options: Any) -> tuple[Any, str]:
    """Return a model's configuration and where it is from.

    It is that of ``config_from`` (a folder or a config.json), else of the model's folder, else the copy shipped for the
    paper's models, else the hub's; ``options`` are those of `from_pretrained`. `InputError`: it cannot be read.
    """
    shipped = CONFIGS / f"{name.replace('/', '--')}.json"
    if config_from is not None:
        path, source = config_from.expanduser(), str(config_from)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"--config-from {config_from}: there is no config.json")
    elif shipped.exists() and not Path(name).expanduser().exists():
        path, source = shipped, "configuration shipped with bupo"
    else:
        path = Path(resolve_model(name))
        source = "its folder" if path.is_dir() else "the hub"
    try:
        find_on_hub(str(path), options.get("revision"))
        return AutoConfig.from_pretrained(str(path), **options), source
    except Exception as error:  # transformers and the hub raise many types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no configuration of a model at {path} ({reason}); name one with --config-from") from error


def fake_model(config: Any, dtype: torch.dtype = torch.float32, lora: Any = None) -> Any:
    """Return a model without numbers; call it within a `FakeTensorMode`. Raises `InputError` if it is no causal LM."""
    with unset_fake_temporarily(), torch.device("meta"):  # PEFT cannot move fake tensors
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise InputError(f"this is not a causal LM: {' '.join(str(error).split())[:200]}") from error
        if lora is not None:
            from peft import get_peft_model  # only recipes with adapters need it

            model = get_peft_model(model, lora)
    model.to_empty(device="cpu")
    (model.get_base_model() if lora is not None else model).tie_weights()  # `to_empty` unties them
    return model


def with_layers(config: Any, kinds: list[str | None]) -> Any:
    """Return the configuration with a layer of each kind (such as sliding-window attention), in order."""
    cut = deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = len(kinds)
    if any(kinds):
        text.layer_types = kinds
    return cut


def describe_model(config: Any) -> dict[str, Any]:
    """Return the numbers of layers and parameters, the vocabulary's size and the model's width."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config)
    layout, embedding = find_layout(model), model.get_input_embeddings().weight
    tied = layout.unembedding.weight is embedding
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layout.layers]
    parameters = {
        "total": sum(p.numel() for p in model.parameters()),
        "embedding": embedding.numel(),
        "head": 0 if tied else sum(p.numel() for p in layout.unembedding.parameters()),
        "layers": sum(layers),
        "largest_layer": max(layers),
        "matrices": sum(p.numel() for layer in layout.layers for p in layer.parameters() if p.ndim > 1),
    }
    vocabulary, width = layout.unembedding.weight.shape
    return {"layers": len(layers), "vocabulary": vocabulary, "width": width, "tied": tied, "parameters": parameters}
