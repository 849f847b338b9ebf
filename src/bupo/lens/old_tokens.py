"""Readings of single tokens at every layer: how sure a layer is, of what, and how far it is from the final policy.

Shape legend: L layers, N tokens, d width, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bupo.models.unembed import Unembedding


@dataclass(frozen=True)
class TokenReadings:
    """Each (L, N), ``top`` and ``top_probability`` (L, N, K).

    Attributes:
        entropy: nats.
        logprob: of the token that was generated, nats.
        rank: of that token among the vocabulary, from 1.
        kl: ``KL(pi^l || pi)`` to the final policy, nats.
        top: the K most likely tokens, most likely first, and their probabilities.
    """

    entropy: Tensor
    logprob: Tensor
    rank: Tensor
    kl: Tensor
    top: Tensor
    top_probability: Tensor


def read_tokens(
    states: Tensor, final: Tensor, targets: Tensor, unembedding: Unembedding, *, top: int = 5, rows: int = 64
) -> TokenReadings:
    """Read ``softmax(S E_u^T)`` of few tokens whole, ``rows`` tokens of one layer at a time.

    Args:
        states: H^1 .. H^L at the positions that predict the targets, (L, N, d) float32.
        final: ``LN(H^L)`` at the same positions, (N, d): the state of the final policy.
        targets: the tokens that were generated, (N,).
        rows: tokens handled at a time; the working set is about ``4 * rows * V`` numbers.
    """
    parts = []
    for first in range(0, len(targets), rows):
        at = slice(first, first + rows)
        reference = _log_softmax(final[at], unembedding)
        layers = [_read(_log_softmax(state[at], unembedding), reference, targets[at], top) for state in states]
        parts.append([torch.stack(column) for column in zip(*layers, strict=True)])
    return TokenReadings(*(torch.cat(column, dim=1).cpu() for column in zip(*parts, strict=True)))


def _log_softmax(state: Tensor, unembedding: Unembedding) -> Tensor:
    weight = unembedding.weight.float()
    return unembedding.to_logits_(state @ weight.T, slice(None)).double().log_softmax(-1)


def _read(logps: Tensor, reference: Tensor, targets: Tensor, top: int) -> tuple[Tensor, ...]:
    shares = logps.exp()
    chosen = logps.gather(-1, targets[:, None])
    best = shares.topk(min(top, shares.shape[-1]), dim=-1)
    return (
        -(shares * logps).sum(-1),
        chosen.squeeze(-1),
        1 + (logps > chosen).sum(-1),
        (shares * (logps - reference)).sum(-1),
        best.indices,
        best.values,
    )
