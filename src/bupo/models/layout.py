"""Finds the parts of a Hugging Face causal LM; only this file and `residual`, by a probe, know module structures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bupo.errors import InputError


@dataclass(frozen=True)
class DecoderLayout:
    """The parts of a decoder-only LM that internal policies use."""

    backbone: Any  # the decoder, whose `last_hidden_state` is LN(H^L)
    layers_name: str  # the backbone's attribute that is the list of layers
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembedding: Any  # the module that holds E_u (V, d), usually `lm_head`

    @property
    def n_layers(self) -> int:
        return len(self.layers)


def unwrap(model: nn.Module) -> Any:
    """Return the Hugging Face model inside DDP, torch.compile and PEFT wrappers."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "config"):
            inner = inner.module
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode within this context; afterwards, every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def find_layout(model: nn.Module) -> DecoderLayout:
    """Find the parts of a decoder-only causal LM; `InputError` if it is none, or its unembedding cannot be read."""
    inner = unwrap(model)
    name = type(inner).__name__
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_output_embeddings"):
        raise InputError(f"{name} is not a Hugging Face model; pass an AutoModelForCausalLM")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model; internal policies need a decoder-only causal LM")
    unembedding = inner.get_output_embeddings()
    weight = getattr(unembedding, "weight", None)
    if weight is None:
        raise InputError(f"{name} has no unembedding (lm_head); load it with AutoModelForCausalLM")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(unembedding).__name__
        remedy = "load the model with lm_head left unquantised (e.g. modules_to_not_convert=['lm_head'])"
        raise InputError(f"{name}: the unembedding is quantised ({kind}) and cannot be read; {remedy}")
    if weight.is_meta:
        remedy = "load the model with a device_map that keeps lm_head (and tied embeddings) on a device"
        raise InputError(f"{name}: the unembedding is offloaded and not in memory; {remedy}")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    backbone, lists = _find_backbone(inner, count)
    if len(lists) != 1 or not inner.can_generate():
        found = f"{type(backbone).__name__} has {len(lists)} such lists"
        raise InputError(f"{name} is not a decoder-only causal LM with one list of {count} layers ({found})")
    norms = [child for child, module in backbone.named_children() if "norm" in type(module).__name__.lower()]
    # an input norm is taken only where there is no other norm (LFM-2 calls its final norm `embedding_norm`)
    norms = [child for child in norms if not any(w in child for w in ("embed", "emb_", "input"))] or norms
    if not norms:
        raise InputError(f"{name}: no final norm found on {type(backbone).__name__}; this layout cannot be read")
    # not by attribute: inside `internal_policy` the first l layers shadow it
    layers = tuple(backbone._modules[lists[0]])
    return DecoderLayout(backbone, lists[0], layers, getattr(backbone, norms[-1]), unembedding)


def context_length(config: Any) -> int | None:
    """The longest sequence that a model's configuration allows (``max_position_embeddings``), or None if unset.

    Of LongRoPE (Phi-4-mini), the length beyond which one sequence makes the model rotate the positions of its whole
    batch in another way, so that the scores of the others change.
    """
    text = config.get_text_config()
    context, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        context = rope.get("original_max_position_embeddings") or context
    return int(context) if context else None


def vocabulary_size(model: Any) -> int | None:
    """The number of token ids that a model embeds, or None if its embedding does not say."""
    return getattr(unwrap(model).get_input_embeddings(), "num_embeddings", None)


def _find_backbone(inner: Any, count: int | None) -> tuple[Any, list[str]]:
    """Return the module that owns the list of ``count`` layers, and the names of such lists on it."""

    def lists(module: nn.Module) -> list[str]:
        children = module.named_children()
        return [name for name, child in children if isinstance(child, nn.ModuleList) and len(child) == count != 0]

    backbone = inner.base_model
    if not lists(backbone) and hasattr(inner, "get_decoder"):
        backbone = inner.get_decoder()  # multimodal and OPT-like models nest the decoder one level down
    if not lists(backbone):  # Llama-4 declares a prefix that its text model does not have
        owners = [module for module in inner.modules() if lists(module)]
        backbone = owners[0] if len(owners) == 1 else backbone
    return backbone, lists(backbone)


def first_tensor(value: Any) -> Tensor | None:
    """Return the hidden states in a module's input or output (tensor, tuple, dict), or None if there are none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = [value.get("hidden_states"), *value.values()]
    if isinstance(value, (tuple, list)):
        return next((v for v in value if isinstance(v, Tensor) and v.is_floating_point()), None)
    return None


def module_input(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the hidden states that a module was called with, by position or by name, or None."""
    positional = first_tensor(args)
    return positional if positional is not None else first_tensor(kwargs)


def on_input(module: nn.Module, receive: Callable[[Tensor | None], None]) -> RemovableHandle:
    """Call ``receive`` with the hidden states that each call of a module gets."""
    return module.register_forward_pre_hook(lambda _, args, more: receive(module_input(args, more)), with_kwargs=True)


def on_output(module: nn.Module, receive: Callable[[Tensor | None], None]) -> RemovableHandle:
    """Call ``receive`` with the hidden states that each call of a module returns."""
    return module.register_forward_hook(lambda _, args, output: receive(first_tensor(output)))
