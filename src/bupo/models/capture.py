"""The residual stream of one forward, handed out in groups of layers as it is produced; nothing else is kept.

Shape legend: B batch, T positions, N kept tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bupo.lens.softmax_stats import LayerStates
from bupo.models.layout import find_layout, first_tensor, module_input
from bupo.models.residual import find_residual_writes

Consumer = Callable[[int, Tensor, list[LayerStates], Tensor], None]
_PLACES = {"attn_in": 0, "attn_out": 1, "ffn_in": 2, "ffn_out": 3}


@dataclass
class _Group:
    """What has been produced and not handed out yet."""

    first_layer: int = 1
    before: Tensor | None = None  # H^{l-1} before the first layer of the group
    layers: list[LayerStates] = field(default_factory=list)
    current: Tensor | None = None  # the states of the layer that is running, (4, N, d)
    seen: set[str] = field(default_factory=set)


@torch.no_grad()
def capture_stream(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    keep: Tensor,
    consume: Consumer | None,
    *,
    group: int = 4,
) -> Tensor:
    """Run the backbone once and hand out the states of the kept tokens, ``group`` layers at a time.

    Args:
        model: a causal LM (see :func:`bupo.models.layout.find_layout`), in evaluation mode.
        input_ids: (B, T).
        attention_mask: (B, T), 1 for tokens.
        keep: (B, T) bool, the N positions to read (row-major order).
        consume: called as ``consume(first_layer, before, layers, after)``: the group's first layer (from 1),
            ``H^{l-1}`` before it (N, d), the states of its layers, and ``H^l`` after the last (N, d); float32 tensors.
            None: only the final state is wanted.
        group: layers handed out together.

    Returns:
        ``LN(H^L)`` (N, d), float32: what the unembedding receives in an ordinary forward.

    Raises:
        InputError: the layers do not add two contributions to the stream (see
            :func:`bupo.models.residual.find_residual_writes`).
    """
    layout = find_layout(model)
    blocks = find_residual_writes(model)
    rows = keep.reshape(-1).nonzero().squeeze(-1)
    home = layout.unembedding.weight.device
    state = _Group()

    def pick(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        # indexing copies; with a device_map, layers live on several devices, their states meet at the unembedding
        return tensor.reshape(-1, tensor.shape[-1])[rows.to(tensor.device)].to(home, torch.float32)

    def finish_layer(index: int, output: Tensor) -> None:
        assert state.current is not None
        assert len(state.seen) == len(_PLACES)
        state.layers.append(LayerStates(state.current))
        state.current, state.seen = None, set()
        if len(state.layers) == group or index + 1 == layout.n_layers:
            after = pick(output)
            assert state.before is not None
            assert consume is not None
            consume(state.first_layer, state.before, state.layers, after)
            state.first_layer, state.before, state.layers = index + 2, after, []

    hooks = []

    def place(name: str, tensor: Tensor | None, scale: float = 1.0) -> None:
        """Write a state where it stays until it is consumed: never two copies of a layer."""
        assert tensor is not None
        if state.current is None:
            state.current = torch.empty(4, len(rows), tensor.shape[-1], dtype=torch.float32, device=home)
        found, into = pick(tensor), state.current[_PLACES[name]]
        if name in state.seen:  # a contribution of two modules that run side by side
            into.add_(found, alpha=scale)
        elif scale != 1.0:
            torch.mul(found, scale, out=into)
        else:
            into.copy_(found)
        state.seen.add(name)

    def on_input(module: nn.Module, name: str) -> None:
        def hook(m: nn.Module, args: tuple, kwargs: dict) -> None:
            place(name, module_input(args, kwargs))

        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(module: nn.Module, name: str, scale: float) -> None:
        def hook(m: nn.Module, args: tuple, output: object) -> None:
            place(name, first_tensor(output), scale)

        hooks.append(module.register_forward_hook(hook))

    def on_layer(module: nn.Module, index: int) -> None:
        if index == 0:

            def first(m: nn.Module, args: tuple, kwargs: dict) -> None:
                state.before = pick(module_input(args, kwargs))

            hooks.append(module.register_forward_pre_hook(first, with_kwargs=True))

        def done(m: nn.Module, args: tuple, output: object) -> None:
            whole = first_tensor(output)
            assert whole is not None
            finish_layer(index, whole)

        hooks.append(module.register_forward_hook(done))

    for index, (layer, block) in enumerate(zip(layout.layers, blocks, strict=True)):
        if consume is None:
            break
        for part, name in ((block.attn, "attn"), (block.ffn, "ffn")):
            on_input(layer.get_submodule(part.module), f"{name}_in")
            for source, scale in part.terms:
                on_output(layer.get_submodule(source), f"{name}_out", scale)
        on_layer(layer, index)
    try:
        output = layout.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return pick(output.last_hidden_state)


def capture_layers(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: Tensor, *, group: int = 4
) -> tuple[Tensor, Tensor]:
    """``H^1 .. H^L`` (L, N, d) and ``LN(H^L)`` (N, d) of few tokens, float32; arguments as of `capture_stream`."""
    states: list[Tensor] = []

    def consume(first_layer: int, before: Tensor, layers: list[LayerStates], after: Tensor) -> None:
        # H^l within the group is the sum of what its layers add; the group's last state is the model's own
        stream = before
        for layer in layers[:-1]:
            stream = stream + layer.attn_out + layer.ffn_out
            states.append(stream)
        states.append(after)

    final = capture_stream(model, input_ids, attention_mask, keep, consume, group=group)
    assert len(states) == find_layout(model).n_layers
    return torch.stack(states), final
