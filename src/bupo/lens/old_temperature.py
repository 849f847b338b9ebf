"""A layer's policy compared with the final one, as it is and at the temperature that brings it nearest.

The reading of a state is ``softmax(b S E_u^T)`` with an inverse temperature ``b = 1 / T`` that all tokens of a layer
share: 1 in the paper's Eq. 5, fitted here. The fit minimises ``KL(final policy || reading)``, in this direction because

    F(b) = mean_n [ -H(p_n) - b E_{p_n}[z_n] + log sum_v exp(b z_nv) ]

is convex in b for any logits z (``F' = E_q[z] - E_p[z]``, ``F'' = Var_q[z] >= 0``), so that there is one answer and
Newton's method finds it; the other direction is not convex, and is small for a reading that is merely sharp. The best b
may be 0 (T infinite): then no temperature makes the state say anything about the next token. It cannot be negative.

Shape legend: N tokens, d width, V vocabulary. Entropies and divergences in nats, float32 products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bupo.models.unembed import Unembedding, matmul_fp32_

HELD = 2**26  # logits of one layer kept between two looks at them, 256 MiB; beyond it they are made again
CHUNK = 2**21  # logits made by one product
TILE = 2**14  # vocabulary entries whose embeddings are looked at together
PIECE = 2**18  # logits exponentiated together: these stay in the processor's cache
_NOTHING = -80.0  # exp of it is lost in any sum, and what lies far below it is slow to compute with (denormal numbers)
TOLERANCE = 3e-4  # of a fitted temperature, relative
_STEEPEST = 1e4  # times one over the logits' spread: policies that sharp are all the same


@dataclass(frozen=True)
class Final:
    """The final policy ``p = softmax(LN(H^L) E_u^T)`` at N tokens, without its V probabilities.

    Attributes:
        states: ``LN(H^L)`` (N, d).
        entropy: of p, nats (N,) float64.
        top: its most likely token (N,).
        embedding: ``sum_v p_v e_v`` (N, d); with it ``E_p[z]`` of any state is one inner product.
        offset: ``sum_v p_v bias_v`` (N,).
    """

    states: Tensor
    entropy: Tensor
    top: Tensor
    embedding: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Comparison:
    """One layer's reading ``q = softmax(b z)`` against the final policy p; tensors are (N,) float64.

    Attributes:
        inverse_temperature: b.
        entropy: of q, nats.
        kl: ``KL(p || q)``, nats.
        slope: ``E_q[z] - E_p[z]``, the derivative of `kl` with respect to b.
        curvature: ``Var_q[z]``, its second derivative.
        hit: 1 where q's most likely token is p's.
    """

    inverse_temperature: float
    entropy: Tensor
    kl: Tensor
    slope: Tensor
    curvature: Tensor
    hit: Tensor

    def entropy_influence(self) -> Tensor:
        """Per-token values (N,) whose mean is the mean entropy and whose spread includes that b was fitted to tokens.

        With b the root of ``mean(slope)``, other tokens would move it by ``-mean(slope) / mean(curvature)``, and the
        entropy by ``-b curvature`` times that: by ``b mean(slope)``. At b = 0, a bound, nothing moves.
        """
        return self.entropy + self.inverse_temperature * self.slope


def read_final(states: Tensor, unembedding: Unembedding) -> Final:
    """Read the final policy from ``LN(H^L)`` (N, d)."""
    weight, bias = unembedding.weight, unembedding.bias
    parts = []
    for rows in _slices(len(states), len(weight)):
        logps = _logits(states[rows], unembedding).log_softmax(-1)
        shares = logps.exp()
        embedding = states.new_zeros(len(shares), weight.shape[1])
        for start in range(0, len(weight), TILE):
            tile = slice(start, start + TILE)
            embedding += shares[:, tile] @ weight[tile].float()
        offset = shares @ bias if bias is not None else shares.new_zeros(len(shares))
        parts.append((-(shares * logps).sum(-1).double(), logps.argmax(-1), embedding, offset))
    return Final(states, *(torch.cat(column) for column in zip(*parts, strict=True)))


def compare(
    states: Tensor, final: Final, unembedding: Unembedding, *, start: float = 1.0
) -> tuple[Comparison, Comparison]:
    """Read the states of one layer (N, d) as they are (b = 1), and at the temperature nearest to the final policy.

    Args:
        start: where the search for b begins, such as the layer below's; it changes the time taken, not the answer.
    """
    logits = _Logits(states, final, unembedding)
    return logits.at(1.0), _fit(logits, start)


def _fit(logits: _Logits, start: float) -> Comparison:
    """Newton's method on ``log b``, kept between the bounds that the signs of the slope have shown."""
    if logits.slope_at_zero >= 0:
        return logits.at(0.0)
    low, high = -math.inf, math.log(_STEEPEST / max(logits.spread, 1e-30))
    position = min(math.log(start), high) if start > 0 else math.log(1 / max(logits.spread, 1e-30))
    for _ in range(100):
        found = logits.at(math.exp(position))
        slope, curvature = found.slope.mean().item(), found.curvature.mean().item()
        if slope < 0:
            low = position
        else:
            high = position
        step = -slope / max(found.inverse_temperature * curvature, 1e-300)
        if abs(step) < TOLERANCE or high - low < TOLERANCE:
            break
        position += max(-2.0, min(2.0, step))
        if not low < position < high:
            position = (low + high) / 2 if low > -math.inf else high - 2.0
    return found


class _Logits:
    """The logits of one layer at all tokens, chunk by chunk, each row relative to its maximum."""

    def __init__(self, states: Tensor, final: Final, unembedding: Unembedding):
        self._states, self._final, self._unembedding = states, final, unembedding
        held: list[Tensor] | None = [] if len(states) * len(unembedding.weight) <= HELD else None
        expected, means, hits = [], [], []
        for rows, shifted, top in self._make():
            expected.append(self._expected(rows, shifted, top[0]))
            means.append(shifted.mean(-1))
            hits.append(top[1] == final.top[rows])
            if held is not None:
                held.append(shifted)
        self._held = held
        self._expected_logit = torch.cat(expected).double()
        self._hits = torch.cat(hits).double()
        mean = torch.cat(means).double()
        self.slope_at_zero = (mean - self._expected_logit).mean().item()
        self.spread = -mean.mean().item()  # how far logits lie below the largest one

    def at(self, inverse_temperature: float) -> Comparison:
        """The comparison at ``b``."""
        sums = []
        for shifted in self._held if self._held is not None else (chunk for _, chunk, _ in self._make()):
            for piece in shifted.split(max(1, PIECE // shifted.shape[-1])):
                weights = (piece * inverse_temperature).clamp_(min=_NOTHING).exp_()
                total = weights.sum(-1)
                first = weights.mul_(piece).sum(-1)
                sums.append(torch.stack([total, first, weights.mul_(piece).sum(-1)]))
        total, first, second = torch.cat(sums, dim=1).double()
        mean, log_total = first / total, total.log()
        return Comparison(
            inverse_temperature,
            entropy=log_total - inverse_temperature * mean,
            # not negative but for rounding
            kl=(log_total - inverse_temperature * self._expected_logit - self._final.entropy).clamp(min=0),
            slope=mean - self._expected_logit,
            curvature=(second / total - mean.square()).clamp(min=0),
            hit=self._hits,
        )

    def _make(self) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:
        for rows in _slices(len(self._states), len(self._unembedding.weight)):
            logits = _logits(self._states[rows], self._unembedding)
            values, places = logits.max(-1)
            yield rows, logits.sub_(values[:, None]), (values, places)

    def _expected(self, rows: slice, shifted: Tensor, maximum: Tensor) -> Tensor:
        """``E_p[z - max z]`` (n,)."""
        unembedding, final = self._unembedding, self._final
        if unembedding.softcap is None:
            inner = (self._states[rows].double() * final.embedding[rows].double()).sum(-1)
            return unembedding.scale * inner + final.offset[rows] - maximum
        # soft-capped logits are not linear in the state: the final policy itself is needed
        logits = _logits(final.states[rows], unembedding)
        return (logits.softmax(-1) * shifted).sum(-1).double()


def _logits(states: Tensor, unembedding: Unembedding) -> Tensor:
    """(n, V) float32, made tile by tile: a 16-bit ``E_u`` is never held in float32 as a whole."""
    weight, half = unembedding.weight, unembedding.low_precision
    states = states.to(weight.dtype) if half else states.float()
    logits = torch.empty(len(states), len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), TILE):
        part = weight[start : start + TILE]
        out = logits[:, start : start + len(part)]
        product = torch.empty(out.shape, dtype=torch.float32, device=weight.device)
        matmul_fp32_(states, part if half and part.is_cuda else part.float(), product, low_precision=half)
        out.copy_(product)
    return unembedding.to_logits_(logits, slice(None))


def _slices(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, CHUNK // columns)
    for first in range(0, rows, size):
        yield slice(first, first + size)
