"""Where things are in a Hugging Face causal LM: backbone, layers, final norm, unembedding, and what a layer adds.

The only file that knows transformers' module structure. Names are looked for, never trusted: which submodules' outputs
are the attention's and the FFN's contribution to the residual stream is found by ``model/probe.py`` on a short batch.

Shape legend: B batch, T positions, N tokens, d width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bupo.errors import InputError


@dataclass(frozen=True)
class DecoderLayout:
    """The parts of a decoder-only LM that internal policies need.

    Attributes:
        backbone: the decoder, whose ``last_hidden_state`` is ``LN(H^L)``.
        layers_name, norm_name: attribute names of the layer list and the final norm on the backbone.
        layers: the L decoder layers, in order.
        final_norm: the LN of Eq. 1.
        unembedding: the module holding ``E_u`` (V, d), usually ``lm_head``.
    """

    backbone: Any
    layers_name: str
    norm_name: str
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembedding: Any

    @property
    def n_layers(self) -> int:
        return len(self.layers)


def unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside DDP, torch.compile and PEFT wrappers."""
    seen: Any = model
    while True:
        if hasattr(seen, "_orig_mod"):
            seen = seen._orig_mod
        elif isinstance(getattr(seen, "module", None), nn.Module) and not hasattr(seen, "config"):
            seen = seen.module
        elif hasattr(seen, "peft_config") and hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
        else:
            return seen


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is as it was, also one that its owner holds in another mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def find_layout(model: nn.Module) -> DecoderLayout:
    """Find the parts of a causal LM.

    Raises:
        InputError: ``model`` is not a decoder-only causal LM of a layout we can read; the message says what is missing.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_output_embeddings"):
        raise InputError(f"{name} is not a Hugging Face model; pass an AutoModelForCausalLM")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model; internal policies need a decoder-only causal LM")
    unembedding = inner.get_output_embeddings()
    if unembedding is None or getattr(unembedding, "weight", None) is None:
        raise InputError(f"{name} has no unembedding (lm_head); load it with AutoModelForCausalLM")
    _check_unembedding(unembedding, name)
    text_config = config.get_text_config()
    n_layers = getattr(text_config, "num_hidden_layers", None)
    backbone, lists = _find_backbone(inner, n_layers)
    if len(lists) != 1 or not inner.can_generate():
        raise InputError(
            f"{name} is not a decoder-only causal LM with one list of {n_layers} layers on its backbone "
            f"({type(backbone).__name__} has {len(lists)} such lists)"
        )
    norms = [child for child, module in backbone.named_children() if "norm" in type(module).__name__.lower()]
    # an input norm comes into question only where there is no other (LFM-2 calls its final norm `embedding_norm`)
    norms = [child for child in norms if not any(w in child for w in ("embed", "emb_", "input"))] or norms
    if not norms:
        raise InputError(f"{name}: no final norm found on {type(backbone).__name__}; this layout cannot be read")
    layers_name, norm_name = lists[0], norms[-1]
    return DecoderLayout(
        backbone=backbone,
        layers_name=layers_name,
        norm_name=norm_name,
        # `_modules`, not attribute access: inside `internal_policy` the attribute is shadowed by the first l layers
        layers=tuple(backbone._modules[layers_name]),
        final_norm=getattr(backbone, norm_name),
        unembedding=unembedding,
    )


def n_layers(model: nn.Module) -> int:
    """L, the number of decoder layers."""
    return find_layout(model).n_layers


def _check_unembedding(unembedding: Any, name: str) -> None:
    """Refuse an ``E_u`` whose numbers cannot be read: packed by quantisation, or not in memory."""
    weight = unembedding.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = str(weight.dtype) if isinstance(weight, Tensor) else type(unembedding).__name__
        raise InputError(
            f"{name}: the unembedding is quantised ({kind}) and cannot be read; load the model with lm_head left "
            f"unquantised (e.g. modules_to_not_convert=['lm_head'])"
        )
    if weight.is_meta:
        raise InputError(
            f"{name}: the unembedding is offloaded and not in memory; load the model with a device_map that keeps "
            f"lm_head (and tied embeddings) on a device"
        )


def _find_backbone(inner: Any, n_layers: int | None) -> tuple[Any, list[str]]:
    """The module that owns the list of layers, and the names of such lists on it."""
    backbone = inner.base_model
    lists = _layer_lists(backbone, n_layers)
    if not lists and hasattr(inner, "get_decoder"):  # multimodal and OPT-like models nest the decoder one level down
        backbone = inner.get_decoder()
        lists = _layer_lists(backbone, n_layers)
    if not lists:  # Llama-4 declares a prefix that its text model does not have
        owners = [module for module in inner.modules() if _layer_lists(module, n_layers)]
        if len(owners) == 1:
            return owners[0], _layer_lists(owners[0], n_layers)
    return backbone, lists


def _layer_lists(backbone: nn.Module, n_layers: int | None) -> list[str]:
    return [
        child
        for child, module in backbone.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and len(module) > 0
    ]


def first_tensor(value: Any) -> Tensor | None:
    """The hidden states in what a submodule takes or returns (tensor, tuple, model output); None if there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = [value.get("hidden_states"), *value.values()]
    if isinstance(value, (tuple, list)):
        return next((v for v in value if isinstance(v, Tensor) and v.is_floating_point()), None)
    return None


def module_input(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden states a submodule was called with, by position or by name."""
    found = first_tensor(args)
    return found if found is not None else first_tensor(kwargs)
