"""Reading a state with the unembedding: statistics of ``softmax(S E_u^T)`` without ever holding its logits whole.

The vocabulary is walked in tiles; each tile of logits is folded into a running (max, sum, weighted sum) and overwritten
by the next. Since ``E_u`` is linear and the readings carry no norm,

    logits(H^l) = logits(H^{l-1}) + logits(A^l) + logits(F^l),

so four vocabulary products a layer give all five new entropies (arXiv 2512.19673, Eq. 5-7), and tiles are the outer
loop: one tile of ``E_u`` serves all layers of a group while it is warm.

Shape legend: N tokens, d width, V vocabulary, G layers in a group. Entropies in nats, float32 products, float64 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The sites of one layer whose entropies are new; a layer's `layer_in` is the `layer_out` of the one before.
GROUP_SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out")


@dataclass(frozen=True)
class Unembedding:
    """How a model turns a state into logits: ``softcap * tanh((scale * S E_u^T + bias) / softcap)``.

    Attributes:
        weight: ``E_u`` (V, d), float32.
        bias: (V,) or None.
        scale: logit multiplier (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``); 1 for most models.
        softcap: Gemma-2's final soft-capping, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def finish_(self, products: Tensor, start: int, stop: int) -> Tensor:
        """Turn the products of vocabulary entries ``start:stop`` (..., stop - start) into logits, in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.bias is not None:
            products.add_(self.bias[start:stop])
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products


@dataclass
class LayerStates:
    """The states of one layer at N tokens, each (N, d) float32 (Eq. 4).

    Attributes:
        attn_in: what the attention receives, ``LN(H^{l-1})``.
        attn_out: ``A^l``, what it adds to the stream.
        ffn_in: what the FFN receives, ``LN(H^{l-1} + A^l)``.
        ffn_out: ``F^l``.
    """

    attn_in: Tensor
    attn_out: Tensor
    ffn_in: Tensor
    ffn_out: Tensor


class RunningEntropy:
    """Entropy of many categorical distributions from their logits, tile by tile.

    Keeps, for each of ``shape`` distributions, the running maximum m, ``sum exp(z-m)`` and ``sum (z-m) exp(z-m)``;
    then ``H = log(sum) - weighted / sum``.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str):
        self.maximum = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.weighted = torch.zeros(shape, dtype=torch.float64, device=device)

    def update_(self, logits: Tensor, scratch: Tensor) -> None:
        """Fold in one tile (..., v); ``logits`` is overwritten, ``scratch`` is a buffer of the same shape."""
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        logits.sub_(maximum.unsqueeze(-1))
        torch.exp(logits, out=scratch)
        total = scratch.sum(-1)
        weighted = scratch.mul_(logits).sum(-1)
        # what was summed so far was relative to the old maximum
        shift = (self.maximum - maximum).double()
        factor = shift.exp()
        self.weighted = factor * (self.weighted + shift.nan_to_num(neginf=0.0) * self.total) + weighted
        self.total = factor * self.total + total
        self.maximum = maximum

    def entropy(self) -> Tensor:
        """Shannon entropies in nats, float64, of the given shape; NaN where a logit was not finite."""
        return self.total.log() - self.weighted / self.total


def entropy(states: Tensor, unembedding: Unembedding, *, tile: int = 4096, rows: int = 1024) -> Tensor:
    """Entropy in nats (N,), float64, of ``softmax(S E_u^T)`` for states (N, d); no (N, V) tensor exists."""
    found = [_entropy_rows(part, unembedding, tile) for part in states.split(rows)]
    return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float64)


def _entropy_rows(states: Tensor, unembedding: Unembedding, tile: int) -> Tensor:
    running = RunningEntropy((len(states),), states.device)
    for start, weight in _tiles(unembedding.weight, tile):
        logits = unembedding.finish_(states @ weight.T, start, start + len(weight))
        running.update_(logits, torch.empty_like(logits))
    return running.entropy()


def group_entropies(
    before: Tensor,
    layers: Sequence[LayerStates],
    unembedding: Unembedding,
    *,
    tile: int = 2048,
    rows: int = 256,
) -> Tensor:
    """Entropies of every new site of consecutive layers, by four vocabulary products a layer.

    Args:
        before: ``H^{l-1}`` (N, d) before the first of the ``layers``.
        layers: the states of G consecutive layers.
        unembedding: how states become logits.
        tile: vocabulary entries a tile.
        rows: tokens handled at a time; the working set is about ``(4 G + 3) * rows * tile`` numbers.

    Returns:
        (G, 5, N) float64, nats, sites in the order of ``GROUP_SITES``.
    """
    stacked = torch.stack([torch.stack([s.attn_in, s.attn_out, s.ffn_in, s.ffn_out]) for s in layers])  # (G, 4, N, d)
    parts = [
        _group_rows(before[i : i + rows], stacked[:, :, i : i + rows], unembedding, tile)
        for i in range(0, len(before), rows)
    ]
    return torch.cat(parts, dim=-1)


def _group_rows(before: Tensor, stacked: Tensor, unembedding: Unembedding, tile: int) -> Tensor:
    groups, _, n, width = stacked.shape
    running = [RunningEntropy((5, n), before.device) for _ in range(groups)]
    flat = stacked.reshape(groups, 4 * n, width)
    tile = min(tile, len(unembedding.weight))
    stream_buffer = before.new_empty(n, tile)
    logit_buffer = before.new_empty(5, n, tile)
    scratch_buffer = before.new_empty(5, n, tile)
    for start, weight in _tiles(unembedding.weight, tile):
        size = len(weight)
        if size < tile:  # the last, shorter tile
            stream_buffer = before.new_empty(n, size)
            logit_buffer, scratch_buffer = before.new_empty(5, n, size), before.new_empty(5, n, size)
        torch.mm(before, weight.T, out=stream_buffer)
        for group in range(groups):
            torch.mm(flat[group], weight.T, out=logit_buffer[:4].view(4 * n, size))
            stream_buffer.add_(logit_buffer[1]).add_(logit_buffer[3])  # + A^l E_u^T + F^l E_u^T
            logit_buffer[4].copy_(stream_buffer)
            unembedding.finish_(logit_buffer, start, start + size)
            running[group].update_(logit_buffer, scratch_buffer)
    return torch.stack([r.entropy() for r in running])


def _tiles(weight: Tensor, tile: int):
    for start in range(0, len(weight), tile):
        yield start, weight[start : start + tile]
