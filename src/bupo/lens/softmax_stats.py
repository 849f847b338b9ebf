"""Statistics of internal policies ``softmax(S E_u^T)``, their entropy first, in tiles of the vocabulary [Eq. 7].

As ``E_u`` is linear, ``logits(H^l) = logits(H^{l-1}) + logits(A^l) + logits(F^l)``: four products per layer yield its
five new entropies. A tile of ``E_u`` serves every layer of a group while it is in cache, and the tile of
``logits(H^l)`` is carried from layer to layer. Logits are to the base 2, as ``exp2`` costs half as much as ``exp``.
Shape legend: N tokens, n of them in a slice, d width, S sites. Products sum in float32, tiles in float64.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bupo.lens.online import LN2, OnlineSoftmaxStats, ReferenceStats, StatsRequest
from bupo.models.unembed import Unembedding, matmul_fp32_

SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_in", "layer_out")
# those of one layer whose statistics are new: its `layer_in` is the `layer_out` of the one before
GROUP_SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out")
LOG2_E = 1 / LN2
Stats = dict[str, Tensor]


def tile_size(device: torch.device) -> tuple[int, int]:
    """Tokens and vocabulary entries read at once: the fastest measured, for a CPU's outer cache or a full GPU."""
    return (256, 1024) if device.type == "cpu" else (1024, 8192)


def lens_stats(states: Tensor, unembedding: Unembedding, request: StatsRequest | None = None) -> Stats:
    """Statistics of ``softmax(S E_u^T)`` for states (S, N, d): one vocabulary product per site, one for a reference.

    Returns ``entropy``, ``lse`` (log-sum-exp) and what ``request`` names, each (S, N) float64 in nats, but ``top`` and
    ``top_probability`` (S, N, k).
    """
    # at most as many sites at once as a layer has, so that the buffers stay as small
    chunks = _read(states.split(len(GROUP_SITES)), unembedding, request)
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def residual_group_stats(
    before: Tensor,
    layers: Sequence[Tensor],
    unembedding: Unembedding,
    request: StatsRequest | None = None,
    with_before: bool = False,
) -> tuple[Stats, Stats]:
    """Statistics of every new site of G consecutive layers (4, N, d), with four vocabulary products per layer.

    Returns, by name as in `lens_stats`, the statistics of ``before`` (the state before the layers, (N, d)), each
    (1, N[, k]), or nothing without ``with_before``; and those of the `GROUP_SITES`, each (G, 5, N[, k]).
    """
    kernel = _kernel(before.device) if request is None else None
    if kernel is not None:
        states = torch.stack([layer.to(unembedding.weight.dtype) for layer in layers])
        entropies, lse = kernel.read(before, states, unembedding)
        return lens_stats(before[None], unembedding) if with_before else {}, {"entropy": entropies, "lse": lse}
    # a chunk without states of its own reads the stream as it is before the first layer
    stacked = [*([before[None][:0]] if with_before else []), *layers]
    chunks = _read(stacked, unembedding, request, before)
    first = chunks.pop(0) if with_before else {}
    return first, {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _kernel(device: torch.device) -> Any:
    """The fused kernel, on CUDA with triton installed (PyTorch's CUDA builds bring it) unless ``BUPO_TRITON`` is 0."""
    wanted = device.type == "cuda" and os.environ.get("BUPO_TRITON") != "0"
    return importlib.import_module("bupo.lens.triton_kernel") if wanted and importlib.util.find_spec("triton") else None


def _read(
    chunks: Sequence[Tensor], unembedding: Unembedding, request: StatsRequest | None, before: Tensor | None = None
) -> list[Stats]:
    """Statistics of each chunk of states (S, N, d); with ``before``, also of the stream after it, as its last site."""
    parts = []
    step, tile = tile_size(unembedding.weight.device)
    for rows in (slice(first, first + step) for first in range(0, chunks[0].shape[1], step)):
        walk = _Walk(unembedding, (request or StatsRequest()).rows(rows), tile)
        parts.append(walk.read([chunk[:, rows] for chunk in chunks], None if before is None else before[rows]))
    # tokens are the last dimension, except for the top tokens (..., N, k)
    return [
        {name: torch.cat([p[name] for p in of_chunk], dim=-2 if name.startswith("top") else -1) for name in of_chunk[0]}
        for of_chunk in zip(*parts, strict=True)
    ]


class _Walk:
    """The walk over the vocabulary for one slice of n tokens."""

    def __init__(self, unembedding: Unembedding, request: StatsRequest, tile: int):
        self._unembedding, self._request = unembedding, request
        self._tile, self._device = min(tile, len(unembedding.weight)), unembedding.weight.device
        self._product = partial(matmul_fp32_, low_precision=unembedding.low_precision)
        self._reference: ReferenceStats | None = None
        if request.reference is not None:
            self._reference_states = self._prepare(request.reference)
            self._reference = ReferenceStats(len(request.reference), self._device)

    def read(self, chunks: Sequence[Tensor], before: Tensor | None) -> list[Stats]:
        """Statistics of chunks of states (S, n, d), and of the stream that ``before`` (n, d) begins; see `_read`."""
        stream_states = None if before is None else self._prepare(before)
        states = [self._prepare(chunk) for chunk in chunks]
        sums = self._new_sums(states, stream_states)
        n, more = chunks[0].shape[1], int(before is not None)
        most = n * self._tile * (max(map(len, chunks)) + more)
        spaces = [torch.empty(most, dtype=torch.float32, device=self._device) for _ in range(2)]
        stream_space = torch.empty(n * self._tile, dtype=torch.float32, device=self._device)
        for start, weight in self._tiles():
            stream = stream_space[: n * len(weight)].view(n, -1)
            if stream_states is not None:
                self._product(stream_states, weight, stream)
            for chunk, one in zip(states, sums, strict=True):
                own, shape = len(chunk), (len(chunk) + more, n, len(weight))
                logits, scratch = (space[: math.prod(shape)].view(shape) for space in spaces)
                if own:
                    self._product(chunk.flatten(0, 1), weight, logits[:own].flatten(0, 1))
                if more:
                    for contribution in logits[1:own:2]:  # A^l E_u^T and F^l E_u^T
                        stream.add_(contribution)
                    logits[own].copy_(stream)
                one.update_(self._finish_(logits, start), scratch, start, self._reference)
        return [one.statistics(self._reference) for one in sums]

    def _prepare(self, states: Tensor) -> Tensor:
        """States as the products take them: contiguous, with the factor folded in where logits are linear."""
        if self._unembedding.low_precision:
            return states.to(self._unembedding.weight.dtype).contiguous()
        states = states.float().contiguous()
        return states * (LOG2_E * self._unembedding.scale) if self._unembedding.is_linear else states

    def _tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each tile's first vocabulary entry and its rows of ``E_u``, with the reference's logits folded in."""
        weight, low_precision = self._unembedding.weight, self._unembedding.low_precision
        for start in range(0, len(weight), self._tile):
            part = weight[start : start + self._tile]
            part = part if low_precision and part.is_cuda else part.float()
            if self._reference is not None:
                states = self._reference_states
                logits = torch.empty(len(states), len(part), dtype=torch.float32, device=self._device)
                self._product(states, part, logits)
                self._reference.update(self._finish_(logits, start))
            yield start, part

    def _finish_(self, products: Tensor, start: int) -> Tensor:
        """Turn products (..., size) into logits to the base 2, in place."""
        if not self._unembedding.is_linear:
            self._unembedding.to_logits_(products, slice(start, start + products.shape[-1])).mul_(LOG2_E)
        return products

    def _new_sums(self, states: Sequence[Tensor], before: Tensor | None) -> list[OnlineSoftmaxStats]:
        """Empty sums for the sites of each chunk, with the targets' logits if there are targets."""
        targets, sums = self._request.targets, []
        rows = None if targets is None else self._unembedding.weight[targets].float()
        stream = None if rows is None or before is None else (before.float() * rows).sum(-1)
        for chunk in states:
            chosen = None if rows is None else (chunk.float() * rows).sum(-1)  # (S, n)
            if stream is not None and chosen is not None:
                for contribution in chosen[1::2]:
                    stream = stream + contribution
                chosen = torch.cat([chosen, stream[None]])
            if chosen is not None and targets is not None and not self._unembedding.is_linear:
                chosen = self._unembedding.to_logits_(chosen, targets).mul_(LOG2_E)
            shape = (len(chunk) + (before is not None), chunk.shape[1])
            sums.append(OnlineSoftmaxStats(shape, self._device, self._request, chosen))
        return sums
