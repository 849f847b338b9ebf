"""The states of every layer in one forward pass: the residual stream, attention and FFN outputs [Eq. 4].

States are handed out in groups of layers as they are produced, and nothing else is kept in memory.

Shape legend: B batch, T positions, N selected tokens, d width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bupo.models.layout import find_layout, first_tensor, module_input
from bupo.models.residual import LayerWrites, find_residual_writes

_INDEX = {"attn_in": 0, "attn_out": 1, "ffn_in": 2, "ffn_out": 3}


class LayerStates:
    """The states of one layer at N tokens, as one tensor and as views (N, d) of it.

    Attributes:
        stacked: the four states in the order below, (4, N, d).
        attn_in: what the attention receives, ``LN(H^{l-1})``.
        attn_out: ``A^l``, what the attention adds to the residual stream.
        ffn_in: what the FFN receives, ``LN(H^{l-1} + A^l)``.
        ffn_out: ``F^l``, what the FFN adds to the residual stream.
    """

    def __init__(self, stacked: Tensor):
        self.stacked = stacked
        self.attn_in, self.attn_out, self.ffn_in, self.ffn_out = stacked


GroupCallback = Callable[[int, Tensor, list[LayerStates], Tensor], None]


@torch.no_grad()
def capture_stream(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    on_group: GroupCallback | None,
    *,
    group: int = 4,
) -> Tensor:
    """Run the backbone once and hand out the states of the selected tokens, ``group`` layers at a time.

    Args:
        model: a causal LM (see :func:`bupo.models.layout.find_layout`) in evaluation mode.
        input_ids: (B, T).
        attention_mask: (B, T), 1 for tokens and 0 for padding.
        positions: (B, T) bool; True at the N tokens to read, which are returned in row-major order.
        on_group: called as ``on_group(first_layer, before, layers, after)`` with the number of the group's first
            layer (from 1), ``H^{l-1}`` before it (N, d), the states of its layers, and ``H^l`` after its last layer
            (N, d), all in float32. Pass None if only the final state is needed.
        group: number of layers per call.

    Returns:
        ``LN(H^L)`` (N, d) in float32: what the unembedding receives in an ordinary forward pass.

    Raises:
        InputError: the layers do not add two contributions to the stream (see
            :func:`bupo.models.residual.find_residual_writes`).
    """
    layout = find_layout(model)
    recorder = _Recorder(positions, layout.unembedding.weight.device, layout.n_layers, on_group, group)
    try:
        if on_group is not None:
            writes = find_residual_writes(model)
            for index, (layer, layer_writes) in enumerate(zip(layout.layers, writes, strict=True)):
                recorder.attach(index, layer, layer_writes)
        output = layout.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        recorder.detach()
    return recorder.select(output.last_hidden_state)


class _Recorder:
    """Hooks that write the states of a group of layers where they stay until ``on_group`` receives them."""

    def __init__(
        self, positions: Tensor, device: torch.device, n_layers: int, on_group: GroupCallback | None, group: int
    ):
        self._rows = positions.reshape(-1).nonzero().squeeze(-1)
        self._device, self._n_layers, self._on_group, self._group = device, n_layers, on_group, group
        self._hooks: list = []
        self._first_layer = 1
        self._before: Tensor | None = None  # H^{l-1} before the first layer of the group
        self._layers: list[LayerStates] = []
        self._current: Tensor | None = None  # the states of the layer that is running, (4, N, d)
        self._recorded: set[str] = set()

    def select(self, tensor: Tensor | None) -> Tensor:
        """The selected tokens of (B, T, d) as float32 (N, d), copied to the device of the unembedding."""
        assert tensor is not None
        # with a device_map, layers live on several devices; their states meet at the unembedding
        return tensor.reshape(-1, tensor.shape[-1])[self._rows.to(tensor.device)].to(self._device, torch.float32)

    def attach(self, index: int, layer: nn.Module, writes: LayerWrites) -> None:
        """Hook the layer and the submodules that write to the residual stream."""
        for name, write in (("attn", writes.attn), ("ffn", writes.ffn)):
            module = layer.get_submodule(write.module)
            self._before_forward(module, partial(self._record_input, f"{name}_in"))
            for source, scale in write.terms:
                hook = partial(self._record_output, f"{name}_out", scale)
                self._hooks.append(layer.get_submodule(source).register_forward_hook(hook))
        if index == 0:
            self._before_forward(layer, self._record_first)
        self._hooks.append(layer.register_forward_hook(partial(self._finish_layer, index)))

    def _before_forward(self, module: nn.Module, hook: Callable) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record_first(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._before = self.select(module_input(args, kwargs))

    def _record_input(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._record(name, module_input(args, kwargs))

    def _record_output(self, name: str, scale: float, module: nn.Module, args: tuple, output: object) -> None:
        self._record(name, first_tensor(output), scale)

    def _record(self, name: str, tensor: Tensor | None, scale: float = 1.0) -> None:
        state = self.select(tensor)
        if self._current is None:
            self._current = torch.empty(4, *state.shape, dtype=torch.float32, device=self._device)
        target = self._current[_INDEX[name]]
        if name in self._recorded:  # the contribution is the sum of two modules that run side by side
            target.add_(state, alpha=scale)
        elif scale != 1.0:
            torch.mul(state, scale, out=target)
        else:
            target.copy_(state)
        self._recorded.add(name)

    def _finish_layer(self, index: int, module: nn.Module, args: tuple, output: object) -> None:
        assert self._current is not None
        assert len(self._recorded) == len(_INDEX)
        self._layers.append(LayerStates(self._current))
        self._current, self._recorded = None, set()
        if len(self._layers) == self._group or index + 1 == self._n_layers:
            after = self.select(first_tensor(output))
            assert self._before is not None
            assert self._on_group is not None
            self._on_group(self._first_layer, self._before, self._layers, after)
            self._first_layer, self._before, self._layers = index + 2, after, []


def capture_layers(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, *, group: int = 4
) -> tuple[Tensor, Tensor]:
    """Return ``H^1 .. H^L`` (L, N, d) and ``LN(H^L)`` (N, d) in float32; the arguments are those of `capture_stream`.

    All layers are in memory at once, so this is for few tokens.
    """
    states: list[Tensor] = []

    def on_group(first_layer: int, before: Tensor, layers: list[LayerStates], after: Tensor) -> None:
        # within the group, H^l is the sum of what its layers add; the group's last state is the model's own
        stream = before
        for layer in layers[:-1]:
            stream = stream + layer.attn_out + layer.ffn_out
            states.append(stream)
        states.append(after)

    final = capture_stream(model, input_ids, attention_mask, positions, on_group, group=group)
    assert len(states) == find_layout(model).n_layers
    return torch.stack(states), final
