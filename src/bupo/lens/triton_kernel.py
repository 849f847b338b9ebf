"""The walk over the vocabulary as one Triton kernel: products and statistics in one pass, logits never in memory.

One program takes ``ROWS`` tokens and one part of the vocabulary, layer after layer as `bupo.lens.softmax_stats` does. A
tile of logits lives in registers; running maxima and sums go to memory, a triple for each site, token and part, and the
parts are joined in float64. Runs on CUDA; for tests with ``TRITON_INTERPRET=1`` also on a CPU, slowly.
Shape legend: N tokens, d width, V vocabulary, G layers in a group, P parts of the vocabulary. Logits to the base 2.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from bupo.models.unembed import Unembedding

_LOG2_E = 1 / math.log(2)
WARPS = 8  # with 4 the kernel spills registers on A100 and H100 (`benchmarks/kernel_build.py`)
SITES = 5  # the new sites of a layer
ROWS, TILE, WIDTH_TILE = 64, 128, 32


# Signatures and loads are packed by hand: one argument per line would double the file.
# fmt: off
@triton.jit
def _product(states, weight, rows, columns, row_mask, column_mask, width,
             PRECISE: tl.constexpr, UPCAST: tl.constexpr, WIDTH_TILE: tl.constexpr):
    """(rows, d) x (d, columns), accumulated in float32."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, width, WIDTH_TILE):
        at = start + tl.arange(0, WIDTH_TILE)
        inside = at < width
        left_mask, right_mask = row_mask[:, None] & inside[None, :], column_mask[None, :] & inside[:, None]
        left = tl.load(states + rows[:, None] * width + at[None, :], mask=left_mask, other=0.0)
        right = tl.load(weight + columns[None, :] * width + at[:, None], mask=right_mask, other=0.0)
        if UPCAST:  # the interpreter knows no products of bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        if PRECISE:  # noqa: SIM108  (triton compiles the branch away)
            total = tl.dot(left, right, total, input_precision="ieee")
        else:
            total = tl.dot(left, right, total)
    return total


@triton.jit
def _fold(products, maxima, sums, weighted, place, row_mask, column_mask, bias, scale, softcap, SOFTCAP: tl.constexpr):
    """Finish a tile of products to logits and fold it into the running triple of its site."""
    logits = products * scale + bias[None, :]
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which overflows to the right limits
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    logits = tl.where(column_mask[None, :], logits * 1.4426950408889634, float("-inf"))
    before = tl.load(maxima + place, mask=row_mask, other=float("-inf"))
    total = tl.load(sums + place, mask=row_mask, other=0.0)
    moment = tl.load(weighted + place, mask=row_mask, other=0.0)
    maximum = tl.maximum(before, tl.max(logits, axis=1))
    centred = logits - maximum[:, None]
    share = tl.exp2(centred)
    shift = tl.where(before == float("-inf"), 0.0, before - maximum)
    factor = tl.where(before == float("-inf"), 0.0, tl.exp2(shift))
    added = tl.sum(tl.where(column_mask[None, :], share * centred, 0.0), axis=1)
    tl.store(weighted + place, factor * (moment + shift * total) + added, mask=row_mask)
    tl.store(sums + place, factor * total + tl.sum(share, axis=1), mask=row_mask)
    tl.store(maxima + place, maximum, mask=row_mask)


@triton.jit
def _read(before, states, weight, biases,  # (N, d), (G, 4, N, d), (V, d), (V,)
          maxima, sums, weighted,  # (P, G * SITES, N) each
          tokens, vocabulary, width, part, scale, softcap,  # part: vocabulary entries of a part
          LAYERS: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PRECISE: tl.constexpr,
          UPCAST: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH_TILE: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < tokens
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, vocabulary)
    places: tl.constexpr = 5 * LAYERS
    # 64 bits, because states of many layers and tokens pass 2^31 numbers
    rows64 = rows.to(tl.int64)
    home = tl.program_id(1).to(tl.int64) * places * tokens + rows64
    for start in range(first, last, TILE):
        columns = start + tl.arange(0, TILE)
        column_mask = columns < last
        at = columns.to(tl.int64)
        if BIAS:  # noqa: SIM108
            bias = tl.load(biases + at, mask=column_mask, other=0.0)
        else:
            bias = tl.zeros((TILE,), dtype=tl.float32)
        stream = _product(before, weight, rows64, at, row_mask, column_mask, width, PRECISE, UPCAST, WIDTH_TILE)
        for layer in range(LAYERS):
            for site in tl.static_range(4):
                own = rows64 + (layer * 4 + site) * tokens
                made = _product(states, weight, own, at, row_mask, column_mask, width, PRECISE, UPCAST, WIDTH_TILE)
                place = home + (layer * 5 + site) * tokens
                _fold(made, maxima, sums, weighted, place, row_mask, column_mask, bias, scale, softcap, SOFTCAP)
                if site % 2 == 1:
                    stream += made  # + A^l E_u^T + F^l E_u^T
            place = home + (layer * 5 + 4) * tokens
            _fold(stream, maxima, sums, weighted, place, row_mask, column_mask, bias, scale, softcap, SOFTCAP)
# fmt: on


def read(before: Tensor, states: Tensor, unembedding: Unembedding, parts: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute entropies and log-sum-exps, in nats, of the new sites of a group of layers, each (G, 5, N) float64.

    ``before`` is ``H^{l-1}`` (N, d), ``states`` are attn_in, attn_out, ffn_in, ffn_out of each layer (G, 4, N, d); both
    are converted to the dtype of ``E_u``. The default number of ``parts`` of the vocabulary fills the device.
    """
    weight, bias, softcap = unembedding.weight.contiguous(), unembedding.bias, unembedding.softcap
    before, states = before.to(weight.dtype).contiguous(), states.to(weight.dtype).contiguous()
    (n, width), vocabulary, layers = before.shape, len(weight), len(states)
    blocks = triton.cdiv(n, ROWS)
    if parts is None:
        parts = max(1, min(triton.cdiv(vocabulary, 8 * TILE), 512 // blocks))
    part = triton.cdiv(triton.cdiv(vocabulary, parts), TILE) * TILE
    parts = triton.cdiv(vocabulary, part)
    maxima = torch.full((parts, layers * SITES, n), float("-inf"), dtype=torch.float32, device=before.device)
    sums, weighted = torch.zeros_like(maxima), torch.zeros_like(maxima)
    biases = weight if bias is None else bias.float().contiguous()
    sizes = (n, vocabulary, width, part, unembedding.scale, 1.0 if softcap is None else softcap)
    _read[(blocks, parts)](
        *(before, states, weight, biases, maxima, sums, weighted, *sizes),
        LAYERS=layers,
        SOFTCAP=softcap is not None,
        BIAS=bias is not None,
        PRECISE=weight.dtype is torch.float32,
        UPCAST=os.environ.get("TRITON_INTERPRET") == "1",
        ROWS=ROWS,
        TILE=TILE,
        WIDTH_TILE=WIDTH_TILE,
        num_warps=WARPS,
    )
    maxima, sums, weighted = (parts.double().view(-1, layers, SITES, n) for parts in (maxima, sums, weighted))
    maximum = maxima.amax(0)
    shift = maxima - maximum
    factor = shift.exp2()
    total = (factor * sums).sum(0)
    moment = (factor * (weighted + shift * sums)).sum(0)
    return (total.log2() - moment / total) / _LOG2_E, (maximum + total.log2()) / _LOG2_E
