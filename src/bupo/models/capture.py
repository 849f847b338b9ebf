"""The states of every layer in one forward pass: the residual stream, attention and FFN outputs [Eq. 4].

Shape legend: B batch, T positions, N selected tokens, d width, L layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bupo.models.layout import DecoderLayout, find_layout, on_input, on_output, unwrap
from bupo.models.residual import LayerWrites, find_residual_writes


@torch.no_grad()
def capture_stream(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    images: Mapping[str, Tensor],
    on_group: Callable[[int, Tensor, list[Tensor], Tensor], None] | None,
    *,
    group: int = 4,
) -> Tensor:
    """Run the backbone once and hand out the states of the selected tokens, ``group`` layers at a time, in float32.

    Nothing else is kept in memory. The model must be in evaluation mode. Returns ``LN(H^L)`` (N, d), what the
    unembedding receives in an ordinary forward.

    Args:
        input_ids: (B, T); ``attention_mask`` (B, T) is 1 for tokens and 0 for padding.
        positions: (B, T) bool; True at the N tokens to read, which are returned in row-major order.
        images: what a vision-language model is called with besides, such as ``pixel_values``; empty for text alone.
        on_group: called as ``on_group(first_layer, before, layers, after)`` with the number of the group's first layer,
            ``H^{l-1}`` before it (N, d), the states of its layers, and ``H^l`` after its last layer (N, d); None if
            only the final state is needed. Those of a layer (4, N, d) are what its attention receives,
            ``LN(H^{l-1})``, and adds, ``A^l``, and what its FFN receives, ``LN(H^{l-1} + A^l)``, and adds, ``F^l``.

    Raises `InputError` if the layers do not add two contributions each.
    """
    layout = find_layout(model)
    recorder = _Recorder(positions, layout, on_group, group)
    with ExitStack() as stack:
        if on_group is not None:
            for handle in recorder.hooks(find_residual_writes(model)):
                stack.enter_context(handle)  # removes the hook in the end
        final = _run(model, input_ids, attention_mask, images)
    return recorder.select(final)


class _Recorder:
    """Writes the states of a group of layers where they stay until ``on_group`` receives them."""

    def __init__(self, positions: Tensor, layout: DecoderLayout, on_group: Any, group: int):
        self._rows = positions.reshape(-1).nonzero().squeeze(-1)
        self._layout, self._on_group, self._group = layout, on_group, group
        self._before: Any = None  # H^{l-1} before the first layer of the group
        self._layers: list[Tensor] = []  # those of the group that have run
        self._states: Any = None  # of the layer that is running, (4, N, d)
        self._recorded: set[int] = set()  # which of them are complete, or the first of two terms

    def select(self, tensor: Tensor | None) -> Tensor:
        """Return the selected tokens of (B, T, d) as float32 (N, d) on the device of the unembedding."""
        assert tensor is not None
        rows = tensor.reshape(-1, tensor.shape[-1])[self._rows.to(tensor.device)]
        # with a device_map, layers live on several devices; their states meet at the unembedding
        return rows.to(self._layout.unembedding.weight.device, torch.float32)

    def hooks(self, writes: tuple[LayerWrites, ...]) -> Iterator[RemovableHandle]:
        yield on_input(self._layout.layers[0], self._start)
        for number, (layer, parts) in enumerate(zip(self._layout.layers, writes, strict=True), start=1):
            for place, write in ((0, parts.attn), (2, parts.ffn)):
                yield on_input(layer.get_submodule(write.module), partial(self._record, place, 1.0))
                for source, scale in write.terms:
                    yield on_output(layer.get_submodule(source), partial(self._record, place + 1, scale))
            yield on_output(layer, partial(self._finish_layer, number))

    def _start(self, stream: Tensor | None) -> None:
        self._before = self.select(stream)

    def _record(self, place: int, scale: float, tensor: Tensor | None) -> None:
        state = self.select(tensor)
        if self._states is None:
            self._states = state.new_empty(4, *state.shape)
        if place in self._recorded:  # the contribution is the sum of two modules that run side by side
            self._states[place].add_(state, alpha=scale)
        else:
            torch.mul(state, scale, out=self._states[place])
        self._recorded.add(place)

    def _finish_layer(self, number: int, stream: Tensor | None) -> None:
        assert len(self._recorded) == 4
        self._layers.append(self._states)
        self._states, self._recorded = None, set()
        if len(self._layers) == self._group or number == self._layout.n_layers:
            after = self.select(stream)
            self._on_group(number - len(self._layers) + 1, self._before, self._layers, after)
            self._before, self._layers = after, []


@torch.no_grad()
def capture_layers(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, images: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return ``H^1 .. H^L`` (L, N, d) and ``LN(H^L)`` (N, d) in float32; the arguments are those of `capture_stream`.

    All layers are in memory at once.
    """
    layout, states = find_layout(model), list[Tensor]()
    recorder = _Recorder(positions, layout, None, 1)
    find_residual_writes(model)  # raises an error if a layer's output is not the stream
    with ExitStack() as stack:
        for layer in layout.layers:
            stack.enter_context(on_output(layer, lambda stream: states.append(recorder.select(stream))))
        final = _run(model, input_ids, attention_mask, images)
    return torch.stack(states), recorder.select(final)


def _run(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    """Run the decoder, with images inside its multimodal model; returns its last hidden state (B, T, d)."""
    backbone = unwrap(model).base_model if images else find_layout(model).backbone
    return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **images).last_hidden_state
