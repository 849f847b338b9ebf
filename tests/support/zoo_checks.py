"""What an architecture has to pass: internal policies against an independent reading of an ordinary forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo import internal_policy
from bupo.models.layout import find_layout
from bupo.models.residual import LayerWrites, find_residual_writes


@dataclass
class Rollout:
    """A prompt and its response as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


def layer_list(model: nn.Module, n_layers: int = 4) -> nn.ModuleList:
    """The decoder layers, found without bupo: lists inside a layer come later, so the first of this length counts."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else model  # not the vision tower's
    return next(m for m in text.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def stream(model: nn.Module, ids: Tensor, blocks: tuple[LayerWrites, ...] | None = None) -> dict[str, list[Tensor]]:
    """Raw H^l (and A^l, F^l as ``blocks`` say) of an ordinary whole forward, by hooks; copies."""
    found: dict[str, list[Tensor]] = {"layer": [], "attn": [], "ffn": []}
    hooks = []

    def add(kind: str, index: int, scale: float) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = tensor_of(output).clone().reshape(*ids.shape, -1) * scale
            if len(found[kind]) > index:
                value = value + found[kind].pop()
            found[kind].append(value)

        return hook

    for index, layer in enumerate(layer_list(model)):
        hooks.append(layer.register_forward_hook(add("layer", index, 1.0)))
        for kind, part in () if blocks is None else (("attn", blocks[index].attn), ("ffn", blocks[index].ffn)):
            for name, scale in part.terms:
                hooks.append(layer.get_submodule(name).register_forward_hook(add(kind, index, scale)))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, states: list[Tensor], norm: bool = False) -> list[Tensor]:
    """Logits (B, T, V) that the model's own code after its final norm makes of each state, all layers running."""
    module, calls, total = find_layout(model).final_norm, 0, 0

    def count(*_: Any) -> None:
        nonlocal total
        total += 1

    def replace(m: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        every = torch.cat(states).to(output.dtype)
        return (m.forward(every) if norm else every) if calls == total else output

    handle = module.register_forward_hook(count)
    model(input_ids=ids, use_cache=False)  # some models use this module for the embedding too: the last call counts
    handle.remove()
    handle = module.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids.repeat(len(states), 1), use_cache=False).logits
    finally:
        handle.remove()
    return list(logits.chunk(len(states)))


@dataclass
class Reading:
    """What `read_everything` found: largest relative deviation of logits, and sites where other layers ran."""

    deviation: float
    wrong_layers: list[str]


@torch.no_grad()
def read_everything(
    model: nn.Module, ids: Tensor, components: Sequence[str] = ("layer", "attn", "ffn"), norm: bool = True
) -> Reading:
    """Internal policies of every layer and component against the independent reading."""
    blocks = find_residual_writes(model) if len(components) > 1 else None
    states, worst, wrong = stream(model, ids, blocks), 0.0, []
    sites = [(c, layer, False) for c in components for layer in range(1, len(states["layer"]) + 1)]
    expected = read(model, ids, [states[c][layer - 1] for c, layer, _ in sites])
    if norm:
        sites.append(("layer", 2, True))
        expected += read(model, ids, [states["layer"][1]], norm=True)
    ran: list[int] = []
    hooks = [
        module.register_forward_hook(lambda m, i, o, number=number: ran.append(number))
        for number, module in enumerate(layer_list(model), start=1)
    ]
    try:
        for (component, layer, normed), logits in zip(sites, expected, strict=True):
            ran.clear()
            with internal_policy(model, layer, component, norm=normed):
                got = model(input_ids=ids, use_cache=False).logits
            worst = max(worst, ((got - logits).abs().max() / logits.abs().max()).item())
            if ran != list(range(1, layer + 1)):
                wrong.append(f"{component} {layer}: layers {ran} ran")
    finally:
        for hook in hooks:
            hook.remove()
    return Reading(worst, wrong)


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, steps: int) -> Tensor:
    """Greedy decoding by whole forwards without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@torch.no_grad()
def generated(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Greedy decoding by the library, with its cache."""
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
