"""How much memory an update and a rollout take: the model's own code run on tensors without numbers, every one counted.

The forward and backward pass of one micro-batch, with the trainer's checkpointing and precision, and a generation's
prefill and last step are carried out on fake tensors while `LiveBytes` adds up what lives. The tiled head of the
trainer, which makes tiles of logits (`bupo.train.tiles`) and makes them again in the backward pass, is replaced by one
that allocates the same.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bupo.models.layout import find_layout
from bupo.plan.shape import cut, fake_model
from bupo.train.tiles import TILE_TOKENS, WIDEST, tile_width

PROBED = (4, 8)  # layers of the two runs that a deeper model's figures are drawn from
_Found = TypeVar("_Found")


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages that were made within the mode and still live, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """These exist already, and do not count."""
        self._known.update(t.untyped_storage()._cdata for t in tensors)

    def restart(self) -> int:
        """The most so far; from here on, the most from here on."""
        most, self.peak = self.peak, self.now
        return most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _TiledHead(torch.autograd.Function):
    """Log-probabilities (N,) from states (N, d) and the unembedding (V, d): only what is allocated on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, compute: torch.dtype, triton: bool, words: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, *(hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2)))
        ctx.compute, ctx.triton, ctx.words = compute, triton, words
        _tiles(hidden, weight, compute, 0 if triton else 3, words)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, *_ = ctx.saved_tensors
        grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32)
        grad_weight = weight.new_empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _tiles(hidden, weight, ctx.compute, 0 if ctx.triton else 7, ctx.words)
        grad = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), grad, None, None, None


def _tiles(hidden: Tensor, weight: Tensor, compute: torch.dtype, temporaries: int, words: int) -> list[Tensor]:
    """One tile of logits, a slice of the weights in the products' precision, float32 tiles beside it and a mask."""
    n, v = min(len(hidden), TILE_TOKENS), min(len(weight), words)
    # without Triton only the pages of the buffer that a narrow vocabulary touches become real
    wide = words if temporaries == 0 else min(words, -(-v // 1024) * 1024)
    made = [hidden.new_empty(n, wide, dtype=compute)]
    if compute != weight.dtype:
        made.append(weight.new_empty(v, weight.shape[1], dtype=compute))
    made += [hidden.new_empty(n, v, dtype=torch.float32) for _ in range(temporaries)]
    return [*made, hidden.new_empty(n, v, dtype=torch.bool)] if temporaries else made


@dataclass(frozen=True)
class Settings:
    """What memory depends on beside the model.

    Attributes:
        dtype, compute: of the weights, and of the products (equal, or bfloat16 by autocast).
        batch, prompt, response: responses a pass, and tokens of each (padded).
        rollout: responses generated at a time.
        accumulates: whether gradients are there already when a micro-batch begins.
        triton: the head's kernel of accelerators (no float32 copies of a tile; only response tokens are scored).
        lora: rank and target modules, or None.
    """

    dtype: torch.dtype
    compute: torch.dtype
    batch: int
    prompt: int
    response: int
    rollout: int
    checkpointing: bool
    accumulates: bool
    triton: bool
    lora: tuple[int, Any] | None = None

    def autocast(self) -> Any:
        return nullcontext() if self.compute == torch.float32 else torch.autocast("cpu", dtype=self.compute)


@dataclass(frozen=True)
class UpdateBytes:
    """Of one micro-batch.

    Attributes:
        kept: by autograd when the forward pass ends.
        gradients: of what is trained.
        trained: parameters that got a gradient.
        scoring: the most that lived in a pass without gradient (old log-probabilities).
        forward, head, backward: the most that lived in each part of the update, gradients included.
    """

    kept: int
    gradients: int
    trained: int
    scoring: int
    forward: int
    head: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.head, self.backward)


@dataclass(frozen=True)
class RolloutBytes:
    """Of a generation by transformers: the KV cache at its end, and the most that lived in its first and last step."""

    cache_per_token: int
    cache: int
    prefill: int
    last: int

    @property
    def peak(self) -> int:
        return max(self.prefill, self.last)


def simulate_update(
    config: Any, layers: int, settings: Settings, *, whole: bool, narrow: bool | None = None
) -> UpdateBytes:
    """Run forward and backward of one micro-batch through the first ``layers`` layers and the head.

    Args:
        whole: through the final norm: the full policy (``layers`` is L then); else the internal policy of a layer.
        narrow: with the tiles of an internal phase (default: unless ``whole``).
    """
    tiles = not whole if narrow is None else narrow
    return _over_layers(lambda n: _update(config, n, settings, whole, tiles), UpdateBytes, layers)


def simulate_rollout(config: Any, layers: int, settings: Settings) -> RolloutBytes:
    """Run the prefill and the last step of a generation of ``settings.rollout`` responses."""
    return _over_layers(lambda n: _rollout(config, n, settings), RolloutBytes, layers)


def _over_layers(run: Callable[[int], _Found], kind: type[_Found], layers: int) -> _Found:
    """``run(layers)``, or the straight line through two cheaper runs: every figure grows by the same a layer."""
    few, more = PROBED
    if layers <= more:
        return run(layers)
    low, high = asdict(cast(Any, run(few))), asdict(cast(Any, run(more)))
    return kind(**{k: low[k] + (high[k] - low[k]) * (layers - few) // (more - few) for k in low})


def _update(config: Any, layers: int, settings: Settings, whole: bool, narrow: bool) -> UpdateBytes:
    with fake_model(cut(config, layers), settings.dtype) as model:
        model = prepare(model, settings)
        layout = find_layout(model)
        used = [p for p in model.parameters() if p.requires_grad]
        if not whole:
            unread = {id(p) for p in layout.final_norm.parameters()}
            used = [p for p in used if id(p) not in unread]
            layout.final_norm.forward = lambda states, *a, **k: states
        ids = torch.zeros(settings.batch, settings.prompt + settings.response, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0  # some padding, as there always is
        track = LiveBytes()
        track.ignore(*model.parameters(), *model.buffers(), ids, mask)
        with track:
            with torch.no_grad():
                _score(layout, ids, mask, settings, narrow)
            scoring = track.peak
            if settings.accumulates:
                for parameter in used:
                    parameter.grad = torch.empty_like(parameter)
            before = track.peak = track.now
            marks = []
            loss = _score(layout, ids, mask, settings, narrow, lambda: marks.append(track.restart())).sum()
            kept = track.now - before
            loss.backward()
            backward = track.peak
        trained = [p for p in used if p.grad is not None]
        return UpdateBytes(
            kept=kept,
            gradients=sum(p.numel() * p.element_size() for p in trained),
            trained=sum(p.numel() for p in trained),
            scoring=scoring,
            forward=marks[0],
            head=marks[1],
            backward=backward,
        )


def prepare(model: nn.Module, settings: Settings) -> Any:
    """A model as the trainer has it: adapters, checkpointing, training mode."""
    made: Any = model.train()
    if settings.lora is not None:
        made.requires_grad_(False)
        rank, targets = settings.lora
        for name, module in list(made.named_modules()):
            if (
                isinstance(module, nn.Linear)
                and module is not made.get_output_embeddings()
                and _is_target(name, targets)
            ):
                parent, _, child = name.rpartition(".")
                setattr(made.get_submodule(parent), child, _Adapted(module, rank))
        if settings.checkpointing:
            made.enable_input_require_grads()
    if settings.checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def _is_target(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


class _Adapted(nn.Module):
    """A linear map with a low-rank adapter in float32, as PEFT runs it (PEFT itself does not take fake tensors)."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0


def _score(
    layout: Any, ids: Tensor, mask: Tensor, settings: Settings, narrow: bool, mark: Callable[[], None] = lambda: None
) -> Tensor:
    """Log-probabilities of the responses; ``mark`` is called after the layers, and when the head's backward is done."""
    with settings.autocast():
        states = layout.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        mark()
        states = states[:, -settings.response :] if settings.triton else states
        flat = states.reshape(-1, states.shape[-1])
        if flat.requires_grad:
            flat.register_hook(lambda grad: mark())
        words = tile_width(ids.numel()) if narrow and not settings.triton else WIDEST
        return _TiledHead.apply(flat, layout.unembedding.weight, settings.compute, settings.triton, words)


def _rollout(config: Any, layers: int, settings: Settings) -> RolloutBytes:
    length = settings.prompt + settings.response
    with fake_model(cut(config, layers), settings.dtype) as model, torch.no_grad(), settings.autocast():
        model.eval()
        track = LiveBytes()
        ids = torch.zeros(settings.rollout, settings.prompt, dtype=torch.long)
        track.ignore(*model.parameters(), *model.buffers(), ids)
        with track:
            mask = torch.ones_like(ids)
            out = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
            small = _cache_bytes(out.past_key_values)
            # the cache that this generation ends with, before its last step
            for layer in getattr(out.past_key_values, "layers", []):
                for name in ("keys", "values"):
                    state = getattr(layer, name, None)
                    if isinstance(state, Tensor) and state.ndim == 4:
                        setattr(layer, name, state.new_empty(*state.shape[:2], length - 1, state.shape[3]))
                        del state
            prefill = track.restart()
            mask = torch.ones(settings.rollout, length, dtype=torch.long)
            last = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            scores = last.logits[:, -1].to(torch.float32, copy=True)
            torch.multinomial(scores.softmax(-1), 1)
        per_token = small // (settings.rollout * settings.prompt)
        return RolloutBytes(per_token, per_token * settings.rollout * length, prefill, track.peak)


def _cache_bytes(cache: Any) -> int:
    tensors = [v for layer in getattr(cache, "layers", []) for v in vars(layer).values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim == 4)
