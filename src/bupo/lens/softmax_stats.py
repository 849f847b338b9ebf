"""Reading a state with the unembedding: statistics of ``softmax(S E_u^T)`` without ever holding its logits whole.

The vocabulary is walked in tiles; each tile of logits is folded into running sums and overwritten by the next. Since
``E_u`` is linear and the readings carry no norm,

    logits(H^l) = logits(H^{l-1}) + logits(A^l) + logits(F^l),

so four vocabulary products a layer give all five new entropies (arXiv 2512.19673, Eq. 5-7). Tokens are the outer loop,
tiles the middle one and the layers of a group the inner one: a tile of ``E_u`` serves every layer while it is in cache,
and the tile of ``logits(H^l)`` goes from layer to layer without a product of its own (one a group, at its start).

Logits are kept to the base 2 here, ``z / ln 2``: ``exp2`` costs half of what ``exp`` does, and the factor is folded
into the states. Results are in nats.

Shape legend: N tokens, d width, V vocabulary, G layers in a group, S sites. Products sum in float32, tiles in float64.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bupo.lens.online import Extras, Running
from bupo.models.capture import LayerStates
from bupo.models.unembed import Unembedding, matmul_fp32_

# The sites of one layer whose entropies are new; a layer's `layer_in` is the `layer_out` of the one before.
GROUP_SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out")
LOG2_E = 1 / math.log(2)


@dataclass
class Tiling:
    """How many tokens and vocabulary entries are handled at a time; the working set is ``11 * rows * tile`` numbers."""

    rows: int
    tile: int

    @classmethod
    def of(cls, device: torch.device, rows: int | None = None, tile: int | None = None) -> Tiling:
        """What was fastest: on a CPU, buffers that stay in the outer cache; on an accelerator, ones that fill it."""
        best = (256, 1024) if device.type == "cpu" else (1024, 8192)
        return cls(rows or best[0], tile or best[1])


def entropy(states: Tensor, unembedding: Unembedding, *, tile: int | None = None, rows: int | None = None) -> Tensor:
    """Entropy in nats (N,), float64, of ``softmax(S E_u^T)`` for states (N, d); no (N, V) tensor exists."""
    return read_states(states[None], unembedding, tile=tile, rows=rows)["entropy"][0]


def read_states(
    states: Tensor,
    unembedding: Unembedding,
    extras: Extras | None = None,
    *,
    tile: int | None = None,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """Statistics of ``softmax(S E_u^T)`` for states (S, N, d): one product each.

    Returns: the statistics by name, each (S, N) float64 (see :class:`bupo.lens.online.Extras`).
    """
    found = []
    tiling = Tiling.of(states.device, rows, tile)
    for part, wanted in _rows(states.shape[1], extras, tiling.rows):
        work = _Work(unembedding, wanted, tiling)
        flat = work.prepare(states[:, part].flatten(0, 1))
        running = work.running((len(states),), [flat])[0]
        for start, weight in work.tiles():
            logits, scratch = work.buffers(len(states), len(weight))
            work.product(flat, weight, logits.flatten(0, 1))
            work.fold(running, logits, scratch, start, work.reference_tile(weight, start))
        found.append(running.statistics())
    return _join(found)


def read_group(
    before: Tensor,
    layers: Sequence[LayerStates],
    unembedding: Unembedding,
    extras: Extras | None = None,
    *,
    tile: int | None = None,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """Statistics of every new site of consecutive layers, by four vocabulary products a layer.

    Args:
        before: ``H^{l-1}`` (N, d) before the first of the ``layers``.
        layers: the states of G consecutive layers.
        unembedding: how states become logits.
        extras: what is wanted beside the entropy.
        tile, rows: see :class:`Tiling`.

    Returns:
        The statistics by name, each (G, 5, N) float64 in nats, sites in the order of ``GROUP_SITES``.
    """
    return _read_group(before, layers, unembedding, extras, tile, rows, begin_too=False)[1]


def read_first_group(
    before: Tensor, layers: Sequence[LayerStates], unembedding: Unembedding, extras: Extras | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The statistics of ``before`` itself, each (1, N), and those of :func:`read_group`, for no product more."""
    return _read_group(before, layers, unembedding, extras, None, None, begin_too=True)


def _read_group(
    before: Tensor,
    layers: Sequence[LayerStates],
    unembedding: Unembedding,
    extras: Extras | None,
    tile: int | None,
    rows: int | None,
    *,
    begin_too: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    kernel = _kernel(before.device) if _only_entropy(extras) else None
    if kernel is not None:
        e, dtype = unembedding, unembedding.weight.dtype
        states = torch.stack([layer.stacked.to(dtype) for layer in layers])
        entropies, lse = kernel.read(before.to(dtype), states, e.weight, e.bias, e.scale, e.softcap)
        first = read_states(before[None], unembedding, extras) if begin_too else {}
        return first, {"entropy": entropies, "lse": lse}
    found, first_found = [], []
    tiling = Tiling.of(before.device, rows, tile)
    for part, wanted in _rows(len(before), extras, tiling.rows):
        work = _Work(unembedding, wanted, tiling)
        flat = [work.prepare(layer.stacked[:, part].flatten(0, 1)) for layer in layers]
        begin = work.prepare(before[part])
        n = len(begin)
        running = work.running((5,), flat, begin)
        first_sums = work.running((1,), [begin])[0] if begin_too else None
        stream = begin.new_empty(n * work.tile, dtype=torch.float32)
        for start, weight in work.tiles():
            size = len(weight)
            tile_of_stream = stream[: n * size].view(n, size)
            work.product(begin, weight, tile_of_stream)
            reference = work.reference_tile(weight, start)
            if first_sums is not None:
                logits, scratch = work.buffers(1, size)
                logits[0].copy_(tile_of_stream)
                work.fold(first_sums, logits, scratch, start, reference)
            for states, sums in zip(flat, running, strict=True):
                logits, scratch = work.buffers(5, size)
                work.product(states, weight, logits[:4].flatten(0, 1))
                tile_of_stream.add_(logits[1]).add_(logits[3])  # + A^l E_u^T + F^l E_u^T
                logits[4].copy_(tile_of_stream)
                work.fold(sums, logits, scratch, start, reference)
        found.append([sums.statistics() for sums in running])
        if first_sums is not None:
            first_found.append(first_sums.statistics())
    grouped = [{name: torch.stack([one[name] for one in part]) for name in part[0]} for part in found]
    return _join(first_found) if begin_too else {}, _join(grouped)


def group_entropies(
    before: Tensor,
    layers: Sequence[LayerStates],
    unembedding: Unembedding,
    *,
    tile: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """The entropies of :func:`read_group`, (G, 5, N) float64."""
    return read_group(before, layers, unembedding, tile=tile, rows=rows)["entropy"]


def _only_entropy(extras: Extras | None) -> bool:
    if extras is None:
        return True
    return not (extras.varentropy or extras.top) and extras.targets is None and extras.final is None


def _kernel(device: torch.device) -> Any:
    """The fused kernel, where it can run: on CUDA with triton installed (which PyTorch's CUDA builds bring)."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from bupo.lens import triton_kernel as kernel_triton

    return kernel_triton if kernel_triton.available() else None


def _rows(tokens: int, extras: Extras | None, rows: int) -> Iterator[tuple[slice, Extras]]:
    wanted = extras or Extras()
    for first in range(0, max(tokens, 1), rows):
        part = slice(first, min(first + rows, tokens))
        yield part, wanted.part(part)


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Along the token dimension, which is the last, but for the top tokens (..., N, k)."""
    return {name: torch.cat([p[name] for p in parts], dim=-2 if name.startswith("top") else -1) for name in parts[0]}


@dataclass
class _Work:
    """Buffers and products for one slice of tokens."""

    unembedding: Unembedding
    extras: Extras
    tiling: Tiling
    _reference: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.tile = min(self.tiling.tile, len(self.unembedding.weight))
        self._space: Tensor | None = None
        if self.extras.final is not None:
            self._reference = self.prepare(self.extras.final)

    def prepare(self, states: Tensor) -> Tensor:
        """States as the products take them: contiguous, with the factor folded in where logits are linear."""
        if self.unembedding.low_precision:
            return states.to(self.unembedding.weight.dtype)
        if self.unembedding.is_linear:
            return states.float() * (LOG2_E * self.unembedding.scale)
        return states.float().contiguous()

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        weight = self.unembedding.weight
        for start in range(0, len(weight), self.tile):
            part = weight[start : start + self.tile]
            yield start, part if self.unembedding.low_precision and part.is_cuda else part.float()

    def buffers(self, sites: int, size: int) -> tuple[Tensor, Tensor]:
        """Two tensors (sites, n, size), the same memory each time."""
        n = self.extras.tokens
        whole = sites * n * self.tile
        if self._space is None or len(self._space) < 2 * whole:
            self._space = torch.empty(2 * whole, dtype=torch.float32, device=self.unembedding.weight.device)
        used = sites * n * size
        return self._space[:used].view(sites, n, size), self._space[whole : whole + used].view(sites, n, size)

    def product(self, states: Tensor, weight: Tensor, out: Tensor) -> None:
        matmul_fp32_(states, weight, out, low_precision=self.unembedding.low_precision)

    def finish(self, products: Tensor, start: int, size: int) -> None:
        """Products (..., size) to logits to the base 2, in place."""
        if not self.unembedding.is_linear:
            self.unembedding.to_logits_(products, slice(start, start + size)).mul_(LOG2_E)

    def fold(self, sums: Running, logits: Tensor, scratch: Tensor, start: int, reference: Tensor | None) -> None:
        self.finish(logits, start, logits.shape[-1])
        sums.update_(logits, scratch, start, reference)

    def reference_tile(self, weight: Tensor, start: int) -> Tensor | None:
        """Logits (n, v) of the final policy, where the divergence from it is wanted."""
        if self._reference is None:
            return None
        logits = torch.empty(len(self._reference), len(weight), dtype=torch.float32, device=weight.device)
        self.product(self._reference, weight, logits)
        self.finish(logits, start, len(weight))
        return logits

    def running(self, sites: tuple[int, ...], flat: list[Tensor], begin: Tensor | None = None) -> list[Running]:
        """One :class:`Running` a layer, with the logits of the realised tokens where they are wanted."""
        shape = (*sites, self.extras.tokens)
        device = self.unembedding.weight.device
        return [
            Running(shape, device, self.extras, chosen, self.unembedding.weight.shape[0])
            for chosen in self._chosen(sites[0], flat, begin)
        ]

    def _chosen(self, sites: int, flat: list[Tensor], begin: Tensor | None) -> Iterator[Tensor | None]:
        targets = self.extras.targets
        if targets is None:
            yield from [None] * len(flat)
            return
        rows = self.unembedding.weight[targets].float()
        stream = None if begin is None else (begin.float() * rows).sum(-1)
        for states in flat:
            found = (states.float().view(-1, len(targets), rows.shape[-1]) * rows).sum(-1)
            if stream is not None:
                stream = stream + found[1] + found[3]
                found = torch.cat([found, stream[None]])
            assert len(found) == sites
            yield found if self.unembedding.is_linear else self.unembedding.to_logits_(found, targets).mul_(LOG2_E)
