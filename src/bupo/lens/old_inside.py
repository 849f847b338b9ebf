"""How the layers of one model stand to each other, token by token (Figure 5 of arXiv 2512.19673).

Shape legend: L layers, N tokens, d width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bupo.models.unembed import Unembedding


@dataclass(frozen=True)
class Inside:
    """Readings of N tokens, float64 on the CPU.

    Attributes:
        logprob: of the realised token under the full policy, nats, (N,).
        entropy: of every layer policy, nats, (L, N).
        divergence: ``KL(pi^l || pi^m)`` of the chosen layer l to the layers m = l+1 .. L and, last, to the full policy,
            nats, (L - l + 1, N).
        cosine: ``cos(H^m, H^n)`` of all pairs of layers, (L, L, N).
    """

    logprob: Tensor
    entropy: Tensor
    divergence: Tensor
    cosine: Tensor


def look_inside(
    states: Tensor, final: Tensor, targets: Tensor, unembedding: Unembedding, layer: int, *, rows: int = 64
) -> Inside:
    """Read every layer's policy whole, ``rows`` tokens at a time.

    Args:
        states: H^1 .. H^L at the positions that predict the targets, (L, N, d) float32.
        final: ``LN(H^L)`` at the same positions, (N, d): the state of the full policy.
        targets: the realised tokens, (N,).
        layer: l, from 1.
        rows: the working set is about ``3 * rows * V`` numbers of 8 bytes.
    """
    weight = unembedding.weight.float()

    def log_policy(state: Tensor) -> Tensor:
        return unembedding.to_logits_(state @ weight.T, slice(None)).double().log_softmax(-1)

    parts = []
    for first in range(0, len(targets), rows):
        at = slice(first, first + rows)
        chosen = log_policy(states[layer - 1, at])
        shares = chosen.exp()
        entropies, divergences = [], []
        for number, state in enumerate(states[:, at], start=1):
            logs = chosen if number == layer else log_policy(state)
            entropies.append(-(logs.exp() * logs).sum(-1))
            if number > layer:
                divergences.append((shares * (chosen - logs)).sum(-1))
        logs = log_policy(final[at])
        divergences.append((shares * (chosen - logs)).sum(-1))
        logprob = logs.gather(-1, targets[at, None]).squeeze(-1)
        unit = torch.nn.functional.normalize(states[:, at].double(), dim=-1)
        cosine = torch.einsum("mnd,knd->mkn", unit, unit)
        parts.append((logprob, torch.stack(entropies), torch.stack(divergences), cosine))
    return Inside(*(torch.cat(column, dim=-1).cpu() for column in zip(*parts, strict=True)))
