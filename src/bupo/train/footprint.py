"""Counts the bytes and operations of an update and of a rollout by running the model's own code on fake tensors.

`MemTracker` adds up the bytes alive at the same time; `FlopCounterMode` counts the operations of matrix products.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from bupo.models.fake import fake_model, with_layers
from bupo.models.layout import find_layout
from bupo.train.layers import Selection, stop_backward
from bupo.train.tiles import TILE_TOKENS, WIDEST, tile_width

Count = Callable[[Any, list[bool]], dict[str, int]]  # of a configuration whose layers are trained or not


@dataclass(frozen=True)
class Workload:
    """What bytes and operations depend on beside the model."""

    dtype: torch.dtype  # of the weights
    compute: torch.dtype  # of matrix products: autocast where it is another
    batch: int  # responses per pass
    prompt: int  # padded tokens of each
    response: int
    samples: int  # responses sampled at once
    checkpointing: bool
    accumulates: bool  # whether gradients exist when a micro-batch begins
    triton: bool  # whether TRL's fused lm_head uses its kernel, which scores response tokens only (accelerators)
    selection: Selection | None = None  # what is trained; None: everything
    lora: Any = None  # PEFT's configuration of the adapters

    def autocast(self) -> Any:
        return nullcontext() if self.compute == self.dtype else torch.autocast("cpu", dtype=self.compute)


def count_update(config: Any, depth: int, work: Workload, *, internal: bool, narrow: bool) -> dict[str, int]:
    """Count one micro-batch's update through ``depth`` layers, and scoring the same responses without gradients.

    ``internal`` trains the internal policy of layer ``depth``, without final norm; ``narrow`` takes an internal phase's
    tiles. Returns ``trained`` parameters; bytes of their ``gradients``; bytes ``kept`` for the backward pass;
    the most bytes alive in an ``update`` and in ``scoring``, beside weights, moments and earlier gradients; operations.
    """
    width = tile_width(work.batch * (work.prompt + work.response)) if narrow and not work.triton else WIDEST

    def count(shallow: Any, trained: list[bool]) -> dict[str, int]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _training_model(shallow, work, internal, trained)
            return _count_bytes(model, work, width) | _count_flops(model, work, width)

    trained = [work.selection is None or layer in work.selection.layers for layer in range(1, depth + 1)]
    return _over_layers(count, config, trained)


def count_rollout(config: Any, depth: int, work: Workload) -> dict[str, int]:
    """Count the bytes of sampling with transformers: KV ``cache`` at the end, and the ``peak`` beside the weights."""

    def count(shallow: Any, _: Any) -> dict[str, int]:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), work.autocast():
            return _count_rollout(fake_model(shallow, work.dtype).eval(), work)

    return _over_layers(count, config, [True] * depth)


def _over_layers(count: Count, config: Any, trained: list[bool]) -> dict[str, int]:
    """Return the count of a model whose layers are ``trained`` or not, of deep models from shallow ones.

    Layers add the same if they have the same kind of attention, are trained or not, and are above or below the lowest
    trained layer, where the backward pass stops.
    """
    depth, lowest = len(trained), (*trained, True).index(True)
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or depth * [None])[:depth]
    if depth <= 4:
        return count(with_layers(config, kinds), trained)
    layers = [(kinds[i], trained[i], i >= lowest) for i in range(depth)]
    start = [*layers[:lowest][:2], *2 * layers[lowest : lowest + 1]]

    def counted(chosen: list[Any]) -> dict[str, int]:
        return count(with_layers(config, [kind for kind, *_ in chosen]), [one for _, one, _ in chosen])

    few = total = counted(start)
    for layer in dict.fromkeys(layers):
        more = counted([*start, layer, layer] if layer[2] else [layer, layer, *start])
        times = layers.count(layer) - start.count(layer)
        total = {name: total[name] + (more[name] - few[name]) * times // 2 for name in few}
    return total


def _training_model(config: Any, work: Workload, internal: bool, trained: list[bool]) -> Any:
    """The model as the trainer has it, with adapters, frozen layers and checkpointing."""
    model = fake_model(config, work.dtype, work.lora).train()
    if work.selection is not None:
        layers = frozenset(number for number, one in enumerate(trained, start=1) if one)
        Selection(layers, work.selection.outside).apply(model)
        stop_backward(model)
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layout = find_layout(model)
    if internal:
        layout.final_norm.requires_grad_(False)
        layout.final_norm.forward = lambda states, *args, **kwargs: states
    for module in model.modules():  # `MemTracker` cannot hook frozen parameters; as buffers they count alike
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    return model


class BytesAlive(MemTracker):
    """`MemTracker` that reports bytes beside those of the objects that exist when it starts."""

    def __init__(self, *existing: Any):
        super().__init__()
        self.track_external(*existing)
        self._before = 0
        self._before = self.alive("current")

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def alive(self, when: str) -> int:
        """Bytes alive now (``current``) or at most (``peak``)."""
        return sum(snapshot["Total"] for snapshot in self.get_tracker_snapshot(when).values()) - self._before


def _count_bytes(model: Any, work: Workload, width: int) -> dict[str, int]:
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # makes the moments
    if not work.accumulates:
        optimizer.zero_grad()
    with BytesAlive(model, optimizer) as scoring, torch.no_grad():
        _score(model, work, width)
    with BytesAlive(model, optimizer) as update:
        loss = _score(model, work, width).sum()
        kept = update.alive("current")
        loss.backward()
    sizes = {
        "trained": sum(p.numel() for p in trained),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
    }
    return {**sizes, "kept": kept, "update": update.alive("peak"), "scoring": scoring.alive("peak")}


def _count_flops(model: Any, work: Workload, width: int) -> dict[str, int]:
    """Count after the bytes, because `FlopCounterMode` keeps recomputed activations alive."""
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as scoring, torch.no_grad():
        _score(model, work, width)
    with FlopCounterMode(display=False) as update:
        _score(model, work, width).sum().backward()
    return {"scoring_flops": scoring.get_total_flops(), "update_flops": update.get_total_flops()}


def _score(model: Any, work: Workload, width: int) -> Tensor:
    """Log-probabilities of one micro-batch's tokens, without numbers."""
    layout = find_layout(model)
    ids = torch.zeros(work.batch, work.prompt + work.response, dtype=torch.long)
    with work.autocast():
        states = layout.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        states = states[:, -work.response - 1 : -1] if work.triton else states[:, :-1]
        flat = states.reshape(-1, states.shape[-1])
        return _TiledHead.apply(flat, layout.unembedding.weight, work.compute, width, not work.triton)


class _TiledHead(torch.autograd.Function):
    """Stand-in for TRL's fused lm_head, which needs real numbers: the same products and the same large tensors.

    Without Triton, torch operations fold each tile of logits, with 3 float32 copies of it alive (7 in the backward
    pass). States are (N, d), the unembedding (V, d).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, compute: torch.dtype, width: int, folds: bool) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.settings = compute, width, 7 * folds
        for _ in _tiles(states, weight, compute, width, 3 * folds):
            pass
        return states.new_empty(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        states, weight = ctx.saved_tensors
        grad_states = torch.empty_like(states, dtype=torch.float32)
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for row, column, tile in _tiles(states, weight, *ctx.settings):
            rows, columns = slice(row, row + len(tile)), slice(column, column + tile.shape[1])
            _accumulate(grad_states[rows], tile, weight[columns])
            if grad_weight is not None:
                _accumulate(grad_weight[columns], tile.t(), states[rows])
        return grad_states.to(states.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 3


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a.float(), b.float(), out=total)  # `addmm_` would not be counted


def _tiles(
    states: Tensor, weight: Tensor, compute: torch.dtype, width: int, copies: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Make tiles of logits one after the other in one buffer; yield the first row and column of each."""
    wide = min(width, -(-len(weight) // 1024) * 1024) if copies else width  # a CPU's untouched pages take no memory
    buffer = states.new_empty(min(len(states), TILE_TOKENS), wide, dtype=compute)
    for row in range(0, len(states), TILE_TOKENS):
        part = states[row : row + TILE_TOKENS].to(compute)
        for column in range(0, len(weight), width):
            entries = weight[column : column + width].to(compute)
            tile = buffer[: len(part), : len(entries)]
            torch.mm(part, entries.t(), out=tile)
            [torch.empty_like(tile, dtype=torch.float32) for _ in range(copies)]
            yield row, column, tile


def _count_rollout(model: Any, work: Workload) -> dict[str, int]:
    length, cached = work.prompt + work.response, 0
    with BytesAlive(model) as tracker:
        ids = torch.zeros(work.samples, work.prompt, dtype=torch.long)
        cache = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1).past_key_values
        for layer in getattr(cache, "layers", []):  # grow to the length before the last step
            sliding = getattr(layer, "is_sliding", False)
            kept = min(length - 1, layer.sliding_window - 1) if sliding else length - 1
            if sliding:
                layer.cumulative_length = length - 1
            for name in ("keys", "values"):
                state = getattr(layer, name, None)
                if isinstance(state, Tensor) and state.ndim == 4:
                    setattr(layer, name, state.new_empty(*state.shape[:2], kept, state.shape[3]))
                    cached += (kept + 1) * state.shape[:2].numel() * state.shape[3] * state.element_size()
                    del state
        tracker.reset_mod_stats()
        mask = torch.ones(work.samples, length, dtype=torch.long)
        last = model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
        torch.multinomial(last.to(torch.float32, copy=True).softmax(-1), 1)
    return {"cache_per_token": cached // mask.numel(), "cache": cached, "peak": tracker.alive("peak")}
