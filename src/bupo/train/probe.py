"""What an internal phase does to the full policy, measured cheaply on some of its own responses once a rollout batch.

All figures are of the weights that made the responses, before the batch's updates:

- ``entropy``: of the full policy, nats a token;
- ``perplexity``: of the full policy on its own responses, ``exp(mean(-log pi))``;
- ``divergence``: ``mean(log pi - log pi^l)`` over the same tokens, an unbiased estimate of KL(full || internal) in
  nats a token;
- ``repetition``: the share of a response's 4-grams that it has said before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NGRAM = 4


def probe_rows(size: int, wanted: int) -> Tensor:
    """Indices of ``wanted`` of ``size`` rows, spread evenly (a batch holds the responses of a prompt side by side)."""
    return torch.linspace(0, size - 1, min(size, wanted)).round().long()


def repeated_ngrams(responses: Iterable[Sequence[int]], n: int = NGRAM) -> tuple[int, int]:
    """How many n-grams of tokens a response has said before, and how many there are; summed over the responses."""
    repeated = total = 0
    for tokens in responses:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated, total


def probe_sums(full: Tensor, internal: Tensor, entropies: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    """What `probe_means` needs, as sums that may be added over processes.

    Args:
        full, internal: log-probabilities of the response tokens under both policies, (B, T).
        entropies: of the full policy, (B, T).
        mask: 1 for a token of the response.
        ids: the response tokens, (B, T).
    """
    repeated, grams = repeated_ngrams(row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True))
    sums = [(values * mask).sum().double() for values in (entropies, -full, full - internal)]
    counts = [mask.sum().double(), *(torch.tensor(float(x), device=full.device).double() for x in (repeated, grams))]
    return torch.stack([*sums, *counts])


def probe_means(sums: Sequence[float]) -> dict[str, float]:
    """The figures, from the sums over all processes."""
    entropy, surprisal, divergence, tokens, repeated, grams = sums
    tokens = max(tokens, 1.0)
    return {
        "entropy": entropy / tokens,
        "perplexity": math.exp(min(surprisal / tokens, 700.0)),
        "divergence": divergence / tokens,
        "repetition": repeated / max(grams, 1.0),
    }
