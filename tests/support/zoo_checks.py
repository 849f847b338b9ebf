"""Checks of an architecture: its internal policies against states of an ordinary forward, recorded without bupo."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bupo import internal_policy
from bupo.models.layout import find_layout
from bupo.models.residual import LayerWrites, find_residual_writes


def layer_list(model: nn.Module, n_layers: int = 4) -> nn.ModuleList:
    """The decoder layers, found without bupo: lists inside a layer come later, so the first of this length counts."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else model  # not the vision tower's
    return next(m for m in text.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)


def stream(model: nn.Module, ids: Tensor, writes: tuple[LayerWrites, ...] | None = None) -> dict[str, list[Tensor]]:
    """H^l (and A^l, F^l according to ``writes``) of an ordinary forward, before any norm; copies with gradients."""
    states: dict[str, list[Tensor]] = {"layer": [], "attn": [], "ffn": []}

    def add(kind: str, index: int, scale: float, module: nn.Module, args: Any, output: Any) -> None:
        state = (output if isinstance(output, Tensor) else output[0]).clone().reshape(*ids.shape, -1) * scale
        if len(states[kind]) > index:
            state = state + states[kind].pop()
        states[kind].append(state)

    hooks = []
    for index, layer in enumerate(layer_list(model)):
        hooks.append(layer.register_forward_hook(partial(add, "layer", index, 1.0)))
        for kind in () if writes is None else ("attn", "ffn"):
            for name, scale in getattr(writes[index], kind).terms:
                hooks.append(layer.get_submodule(name).register_forward_hook(partial(add, kind, index, scale)))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, states: list[Tensor], norm: bool = False) -> list[Tensor]:
    """Logits (B, T, V) that the model's own code after its final norm returns for each state; all layers run."""
    module, calls = find_layout(model).final_norm, []
    with module.register_forward_hook(lambda *_: calls.append(None)):
        model(input_ids=ids, use_cache=False)  # some models use this module for the embedding too: the last call counts

    def replace(m: nn.Module, args: Any, output: Any) -> Any:
        calls.pop()
        stacked = torch.cat(states).to(output.dtype)
        return output if calls else m.forward(stacked) if norm else stacked

    with module.register_forward_hook(replace):
        logits = model(input_ids=ids.repeat(len(states), 1), use_cache=False).logits
    return list(logits.chunk(len(states)))


@torch.no_grad()
def read_all(
    model: nn.Module, ids: Tensor, components: Sequence[str] = ("layer", "attn", "ffn")
) -> tuple[float, list[str]]:
    """Compare the internal policies of every layer and component with `read`.

    Returns the largest relative deviation of logits, and the policies for which not exactly the layers below ran.
    """
    writes = find_residual_writes(model) if len(components) > 1 else None
    states, worst, wrong = stream(model, ids, writes), 0.0, []
    sites = [(c, layer, False) for c in components for layer in range(1, len(states["layer"]) + 1)]
    expected = read(model, ids, [states[c][layer - 1] for c, layer, _ in sites])
    sites.append(("layer", 2, True))
    expected += read(model, ids, [states["layer"][1]], norm=True)
    for (component, layer, norm), logits in zip(sites, expected, strict=True):
        ran: list[int] = []
        hooks = [
            module.register_forward_hook(lambda *_, number=number, ran=ran: ran.append(number))
            for number, module in enumerate(layer_list(model), start=1)
        ]
        with internal_policy(model, layer, component, lens="norm" if norm else "raw"):
            got = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        worst = max(worst, ((got - logits).abs().max() / logits.abs().max()).item())
        if ran != list(range(1, layer + 1)):
            wrong.append(f"{component} {layer}: layers {ran} ran")
    return worst, wrong


@torch.no_grad()
def decodes_alike(model: Any, ids: Tensor, steps: int) -> bool:
    """Whether greedy decoding by the library, with its cache, equals greedy decoding by whole forwards without one."""
    model.generation_config.eos_token_id = None
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return torch.equal(generated, ids)
