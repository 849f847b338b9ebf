"""Where things are in a Hugging Face causal LM: backbone, layers, final norm, unembedding, and what a layer adds.

The only file that knows transformers' module structure. Names are looked for, never trusted: which submodule's output
is the attention's and which the FFN's contribution to the residual stream is found on a short probe batch by solving
``H^l - H^{l-1} = a * A^l + b * F^l`` (Eq. 4 of arXiv 2512.19673, with the multipliers some architectures apply).

Shape legend: B batch, T positions, N tokens, d width, V vocabulary, L layers.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import InputError

# Relative deviation allowed in the residual identity: a few roundings of the dtype that the layer adds in.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Anatomy:
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


@dataclass(frozen=True)
class Part:
    """One contribution of a layer to the residual stream: ``scale`` times the output of submodule ``source``.

    ``module`` is the attention or FFN itself (its input is the ``LN(...)`` of Eq. 12-13); it differs from ``source``
    where a norm follows the module before the sum (Gemma-2, OLMo-2).
    """

    module: str
    source: str
    scale: float = 1.0


@dataclass(frozen=True)
class Block:
    """The two contributions of one layer, and how far ``H^{l-1} + A^l + F^l`` was from ``H^l`` on the probe batch."""

    attn: Part
    ffn: Part
    deviation: float


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


def dissect(model: nn.Module) -> Anatomy:
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
    text_config = config.get_text_config()
    n_layers = getattr(text_config, "num_hidden_layers", None)
    backbone = inner.base_model
    found = _layer_list(backbone, n_layers)
    if not found and hasattr(inner, "get_decoder"):  # multimodal and OPT-like models nest the decoder one level down
        backbone = inner.get_decoder()
        found = _layer_list(backbone, n_layers)
    if len(found) != 1 or not inner.can_generate():
        raise InputError(
            f"{name} is not a decoder-only causal LM with one list of {n_layers} layers on its backbone "
            f"({type(backbone).__name__} has {len(found)} such lists)"
        )
    norms = [
        child
        for child, module in backbone.named_children()
        if "norm" in type(module).__name__.lower() and not any(w in child for w in ("embed", "emb_", "input"))
    ]
    if not norms:
        raise InputError(f"{name}: no final norm found on {type(backbone).__name__}; this layout cannot be read")
    layers_name, norm_name = found[0], norms[-1]
    return Anatomy(
        backbone=backbone,
        layers_name=layers_name,
        norm_name=norm_name,
        # `_modules`, not attribute access: inside `internal_policy` the attribute is shadowed by the first l layers
        layers=tuple(backbone._modules[layers_name]),
        final_norm=getattr(backbone, norm_name),
        unembedding=unembedding,
    )


def _layer_list(backbone: nn.Module, n_layers: int | None) -> list[str]:
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


@dataclass
class _Call:
    name: str
    given: tuple[int, torch.Size] | None  # identity of the input tensor
    made: tuple[int, torch.Size]  # identity of the output tensor
    output: Tensor  # float64 copy, (B*T, d)
    is_module: bool  # has a matrix of parameters: an attention or FFN rather than a norm


class _Probe:
    """Records, for every layer, its input and output and those of its direct children, on one short forward."""

    def __init__(self, anatomy: Anatomy):
        self.calls: list[list[_Call]] = [[] for _ in anatomy.layers]
        self.ends: list[tuple[Tensor, Tensor] | None] = [None for _ in anatomy.layers]
        self.alive: list[Tensor] = []  # keeps recorded tensors alive, so that an address names one tensor
        self.hooks = []
        for index, layer in enumerate(anatomy.layers):
            self.hooks.append(layer.register_forward_hook(self._layer_hook(index), with_kwargs=True))
            for name, child in layer.named_children():
                self.hooks.append(child.register_forward_hook(self._child_hook(index, name), with_kwargs=True))

    def _identity(self, tensor: Tensor | None) -> tuple[int, torch.Size] | None:
        if tensor is None:
            return None
        self.alive.append(tensor)
        return tensor.data_ptr(), tensor.reshape(-1, tensor.shape[-1]).shape

    def _layer_hook(self, index: int):
        def hook(module, args, kwargs, output):
            given, made = module_input(args, kwargs), first_tensor(output)
            if given is not None and made is not None:
                self.ends[index] = (_flat(given), _flat(made))

        return hook

    def _child_hook(self, index: int, name: str):
        def hook(module, args, kwargs, output):
            given, made = module_input(args, kwargs), first_tensor(output)
            if made is None:
                return
            # some layers (Falcon) add in place afterwards: keep a copy of the value, not the tensor
            is_module = any(p.ndim >= 2 for p in module.parameters())
            made_identity = self._identity(made)
            assert made_identity is not None
            self.calls[index].append(_Call(name, self._identity(given), made_identity, _flat(made), is_module))

        return hook

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", torch.float64, copy=True)


_blocks: weakref.WeakKeyDictionary[nn.Module, tuple[Block, ...]] = weakref.WeakKeyDictionary()


def find_blocks(model: nn.Module, *, refresh: bool = False) -> tuple[Block, ...]:
    """What every layer adds to the residual stream, found and checked on a probe batch (cached per model).

    Returns one :class:`Block` a layer.

    Raises:
        InputError: for some layer no two submodule outputs make up ``H^l - H^{l-1}``; the message names the layer,
            the smallest deviation and the submodules seen.
    """
    inner = unwrap(model)
    if not refresh and inner in _blocks:
        return _blocks[inner]
    anatomy = dissect(model)
    probe = _Probe(anatomy)
    was_training = inner.training
    inner.eval()
    try:
        device = anatomy.unembedding.weight.device
        vocabulary = inner.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(16, device=device).view(2, 8) * 7 + 3) % vocabulary
        with torch.no_grad():
            anatomy.backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        probe.close()
        inner.train(was_training)
    dtype = next(inner.parameters()).dtype
    tolerance = _TOLERANCE.get(dtype, 3e-2)
    blocks = tuple(
        _solve_block(index + 1, probe.ends[index], probe.calls[index], tolerance) for index in range(anatomy.n_layers)
    )
    _blocks[inner] = blocks
    return blocks


def _solve_block(layer: int, ends: tuple[Tensor, Tensor] | None, calls: list[_Call], tolerance: float) -> Block:
    names = ", ".join(call.name for call in calls) or "none"
    if ends is None:
        raise InputError(f"layer {layer}: it did not run as a module with hidden states on the probe batch")
    before, after = ends
    change = after - before
    unit = max(before.abs().max().item(), after.abs().max().item(), 1e-30)
    best: tuple[float, _Call, _Call, float, float] | None = None
    same_shape = [call for call in calls if call.output.shape == change.shape]
    for i, first in enumerate(same_shape):
        for second in same_shape[i + 1 :]:
            if first.made == second.made:  # an alias (dropout in evaluation)
                continue
            pair = torch.stack([first.output.flatten(), second.output.flatten()], dim=1)
            solution = torch.linalg.lstsq(pair, change.flatten()[:, None]).solution.flatten().tolist()
            a, b = (1.0 if abs(x - 1) < tolerance * 10 else x for x in solution)
            deviation = (change - a * first.output - b * second.output).abs().max().item() / unit
            if min(abs(a), abs(b)) > 1e-4 and (best is None or deviation < best[0] * 0.5):
                best = (deviation, first, second, a, b)
    if best is None or best[0] > tolerance:
        found = f"smallest relative deviation {best[0]:.1e} ({best[1].name} + {best[2].name})" if best else "no pair"
        raise InputError(
            f"layer {layer}: no two submodules' outputs add up to what the layer adds to the residual stream "
            f"(H^(l-1) + A + F = H^l): {found}, allowed {tolerance:.0e}; submodules seen: {names}"
        )
    deviation, first, second, a, b = best
    return Block(
        Part(_module_of(first, calls), first.name, a), Part(_module_of(second, calls), second.name, b), deviation
    )


def _module_of(source: _Call, calls: list[_Call]) -> str:
    """Walk back along the data flow from what is added to the stream to the attention or FFN that made it."""
    call = source
    for _ in calls:
        if call.is_module:
            return call.name
        previous = next((c for c in calls if c is not call and c.made == call.given), None)
        if previous is None:
            break
        call = previous
    return source.name
