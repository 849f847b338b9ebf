"""Statistics of internal policies ``softmax(S E_u^T)``, their entropy first, in tiles of the vocabulary [Eq. 7].

The vocabulary is walked in tiles; each tile of logits is folded into running sums and overwritten by the next. Since
``E_u`` is linear and the states are read without a norm,

    logits(H^l) = logits(H^{l-1}) + logits(A^l) + logits(F^l),

so four vocabulary products per layer yield all five new entropies. Tokens are the outer loop, tiles the middle one and
the layers of a group the inner one: a tile of ``E_u`` serves every layer while it is in cache, and the tile of
``logits(H^l)`` is carried from layer to layer; it costs one product per group.

Logits are kept to the base 2, ``z / ln 2``, because ``exp2`` costs half as much as ``exp``; the factor is folded into
the states. Results are in nats.

Shape legend: N tokens, d width, V vocabulary, G layers in a group, S sites. Products sum in float32, tiles in float64.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bupo.lens.online import OnlineSoftmaxStats, ReferenceStats, StatsRequest
from bupo.models.capture import LayerStates
from bupo.models.unembed import Unembedding, matmul_fp32_

SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_in", "layer_out")
# those of one layer whose statistics are new: its `layer_in` is the `layer_out` of the one before
GROUP_SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out")
LOG2_E = 1 / math.log(2)
Stats = dict[str, Tensor]


@dataclass(frozen=True)
class Tiling:
    """How many tokens and vocabulary entries are processed at once; the buffers hold ``11 * rows * tile`` numbers."""

    rows: int
    tile: int

    @classmethod
    def of(cls, device: torch.device) -> Tiling:
        """The fastest sizes measured: buffers that stay in a CPU's outer cache, or that fill an accelerator."""
        return cls(256, 1024) if device.type == "cpu" else cls(1024, 8192)


def lens_stats(states: Tensor, unembedding: Unembedding, request: StatsRequest | None = None) -> Stats:
    """Compute statistics of ``softmax(S E_u^T)`` for states (S, N, d) with one vocabulary product per site.

    A reference policy costs one more product.

    Returns:
        ``entropy`` and ``lse`` (log-sum-exp), and what ``request`` names (see :class:`StatsRequest`), by name, each
        (S, N) float64 in nats; ``top`` and ``top_probability`` are (S, N, k).
    """
    parts = []
    for rows, tiles in _token_slices(states.shape[1], unembedding, request or StatsRequest()):
        # at most as many sites at once as a layer has, so that the buffers stay as small
        flat = [tiles.prepare(chunk[:, rows].flatten(0, 1)) for chunk in states.split(len(GROUP_SITES))]
        sums = [tiles.new_sums(chunk) for chunk in flat]
        for start, weight in tiles.walk():
            for chunk, one in zip(flat, sums, strict=True):
                logits, scratch = tiles.buffers(len(chunk) // tiles.n, len(weight))
                tiles.product(chunk, weight, logits.flatten(0, 1))
                tiles.fold(one, logits, scratch, start)
        chunks = [one.statistics(tiles.reference) for one in sums]
        parts.append({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})
    return _join(parts)


def residual_group_stats(
    before: Tensor,
    layers: Sequence[LayerStates],
    unembedding: Unembedding,
    request: StatsRequest | None = None,
    *,
    with_before: bool = False,
) -> tuple[Stats, Stats]:
    """Compute statistics of every new site of G consecutive layers with four vocabulary products per layer.

    Args:
        before: ``H^{l-1}`` (N, d) before the first of the ``layers``.
        layers: the states of the layers.
        unembedding: how states become logits.
        request: which statistics to compute besides the entropy.
        with_before: also compute the statistics of ``before``, which takes no further product.

    Returns:
        The statistics of ``before`` by name, each (1, N[, k]), or an empty dictionary; and those of the new sites, each
        (G, 5, N[, k]), in the order of ``GROUP_SITES`` (see `lens_stats`).
    """
    request = request or StatsRequest()
    kernel = _kernel(before.device) if request.only_entropy else None
    if kernel is not None:
        states = torch.stack([layer.stacked.to(unembedding.weight.dtype) for layer in layers])
        entropies, lse = kernel.read(before, states, unembedding)
        return lens_stats(before[None], unembedding) if with_before else {}, {"entropy": entropies, "lse": lse}
    parts, before_parts = [], []
    for rows, tiles in _token_slices(len(before), unembedding, request):
        flat = [tiles.prepare(layer.stacked[:, rows].flatten(0, 1)) for layer in layers]
        begin = tiles.prepare(before[rows])
        before_sums = tiles.new_sums(begin) if with_before else None
        sums = tiles.new_layer_sums(begin, flat)
        buffer = begin.new_empty(tiles.n * tiles.tile, dtype=torch.float32)
        for start, weight in tiles.walk():
            stream = buffer[: tiles.n * len(weight)].view(tiles.n, -1)
            tiles.product(begin, weight, stream)
            if before_sums is not None:
                logits, scratch = tiles.buffers(1, len(weight))
                logits[0].copy_(stream)
                tiles.fold(before_sums, logits, scratch, start)
            for states, one in zip(flat, sums, strict=True):
                logits, scratch = tiles.buffers(5, len(weight))
                tiles.product(states, weight, logits[:4].flatten(0, 1))
                stream.add_(logits[1]).add_(logits[3])  # + A^l E_u^T + F^l E_u^T
                logits[4].copy_(stream)
                tiles.fold(one, logits, scratch, start)
        layer_stats = [one.statistics(tiles.reference) for one in sums]
        parts.append({name: torch.stack([one[name] for one in layer_stats]) for name in layer_stats[0]})
        if before_sums is not None:
            before_parts.append(before_sums.statistics(tiles.reference))
    return _join(before_parts) if with_before else {}, _join(parts)


def _kernel(device: torch.device) -> Any:
    """The fused kernel where it can run: on CUDA with triton installed (PyTorch's CUDA builds bring it)."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    kernel = importlib.import_module("bupo.lens.triton_kernel")
    return kernel if kernel.available() else None


def _token_slices(n: int, unembedding: Unembedding, request: StatsRequest) -> Iterator[tuple[slice, TileBuffers]]:
    step = Tiling.of(unembedding.weight.device).rows
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        yield rows, TileBuffers(unembedding, request.rows(rows), rows.stop - rows.start)


def _join(parts: list[Stats]) -> Stats:
    """Concatenate along the token dimension: the last one, except for the top tokens (..., N, k)."""
    return {name: torch.cat([p[name] for p in parts], dim=-2 if name.startswith("top") else -1) for name in parts[0]}


class TileBuffers:
    """Buffers and products for one slice of n tokens."""

    def __init__(self, unembedding: Unembedding, request: StatsRequest, n: int):
        self.n, self._unembedding, self._request = n, unembedding, request
        self._device = unembedding.weight.device
        self.tile = min(Tiling.of(self._device).tile, len(unembedding.weight))
        self._space: Tensor | None = None
        self._target_rows = None if request.targets is None else unembedding.weight[request.targets].float()
        self.reference: ReferenceStats | None = None
        if request.reference is not None:
            self.reference, self._reference_states = ReferenceStats(n, self._device), self.prepare(request.reference)

    def prepare(self, states: Tensor) -> Tensor:
        """States as the products take them: contiguous, with the factor folded in where logits are linear."""
        if self._unembedding.low_precision:
            return states.to(self._unembedding.weight.dtype)
        if self._unembedding.is_linear:
            return states.float() * (LOG2_E * self._unembedding.scale)
        return states.float().contiguous()

    def walk(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each tile's first vocabulary entry and its rows of ``E_u``, with the reference's logits folded in."""
        weight, low_precision = self._unembedding.weight, self._unembedding.low_precision
        for start in range(0, len(weight), self.tile):
            part = weight[start : start + self.tile]
            part = part if low_precision and part.is_cuda else part.float()
            if self.reference is not None:
                logits = torch.empty(self.n, len(part), dtype=torch.float32, device=self._device)
                self.product(self._reference_states, part, logits)
                self.reference.update(self._finish_(logits, start))
            yield start, part

    def buffers(self, sites: int, size: int) -> tuple[Tensor, Tensor]:
        """Two tensors (sites, n, size), which share their memory with those of earlier calls."""
        whole = sites * self.n * self.tile
        if self._space is None or len(self._space) < 2 * whole:
            self._space = torch.empty(2 * whole, dtype=torch.float32, device=self._device)
        used = sites * self.n * size
        shape = (sites, self.n, size)
        return self._space[:used].view(shape), self._space[whole : whole + used].view(shape)

    def product(self, states: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write ``states @ weight.T`` into ``out``."""
        matmul_fp32_(states, weight, out, low_precision=self._unembedding.low_precision)

    def fold(self, sums: OnlineSoftmaxStats, products: Tensor, scratch: Tensor, start: int) -> None:
        """Fold a tile of products (S, n, size) into the sums; both buffers are overwritten."""
        sums.update_(self._finish_(products, start), scratch, start, self.reference)

    def _finish_(self, products: Tensor, start: int) -> Tensor:
        """Turn products (..., size) into logits to the base 2, in place."""
        if not self._unembedding.is_linear:
            self._unembedding.to_logits_(products, slice(start, start + products.shape[-1])).mul_(LOG2_E)
        return products

    def new_sums(self, states: Tensor) -> OnlineSoftmaxStats:
        """Empty sums for prepared states (S * n, d)."""
        return self._sums(self._target_products(states), len(states) // self.n)

    def new_layer_sums(self, before: Tensor, layers: list[Tensor]) -> list[OnlineSoftmaxStats]:
        """Empty sums for the five new sites of each layer, given its four prepared states (4 * n, d)."""
        sums = []
        stream = self._target_products(before)
        for states in layers:
            products = self._target_products(states)
            if stream is not None and products is not None:
                stream = stream + products[1] + products[3]
                products = torch.cat([products, stream])
            sums.append(self._sums(products, len(GROUP_SITES)))
        return sums

    def _target_products(self, states: Tensor) -> Tensor | None:
        """Products (S, n) with the targets' rows of ``E_u``, if there are targets."""
        rows = self._target_rows
        return None if rows is None else (states.float().view(-1, self.n, rows.shape[-1]) * rows).sum(-1)

    def _sums(self, chosen: Tensor | None, sites: int) -> OnlineSoftmaxStats:
        targets = self._request.targets
        if chosen is not None and targets is not None and not self._unembedding.is_linear:
            chosen = self._unembedding.to_logits_(chosen, targets).mul_(LOG2_E)
        return OnlineSoftmaxStats((sites, self.n), self._device, self._request, chosen)
