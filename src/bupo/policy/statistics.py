"""Means over tokens with honest standard errors: a response's tokens are correlated, so responses are the clusters."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class ClusterMeans:
    """Running means over tokens of K quantities, with standard errors clustered by response.

    Only sums are kept: one (K,) row and a token count a response. The mean is the ratio ``sum_i S_i / sum_i n_i`` over
    responses i; its standard error is the linearised one, ``sqrt(R/(R-1) sum_i (S_i - mean n_i)^2) / N``.
    With a single response there is nothing to cluster, and the ordinary standard error over its tokens is given.
    """

    def __init__(self, quantities: int):
        self.quantities = quantities
        self.sums: list[Tensor] = []
        self.counts: list[int] = []
        self._squares = torch.zeros(quantities, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take one response's values (K, n), float64."""
        values = values.detach().to("cpu", torch.float64)
        self.sums.append(values.sum(-1))
        self.counts.append(values.shape[-1])
        self._squares += values.square().sum(-1)

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def method(self) -> str:
        """How the standard errors were computed, for the result file."""
        return "clustered by response" if len(self.counts) > 1 else "over tokens (a single response)"

    def table(self) -> tuple[Tensor, Tensor]:
        """Per-response sums (R, K) and token counts (R,), float64."""
        return torch.stack(self.sums), torch.tensor(self.counts, dtype=torch.float64)

    def mean(self) -> Tensor:
        """Means over all tokens, (K,) float64."""
        sums, counts = self.table()
        return sums.sum(0) / counts.sum()

    def standard_error(self) -> Tensor:
        """Standard errors of :meth:`mean`, (K,) float64."""
        sums, counts = self.table()
        total = counts.sum()
        mean = sums.sum(0) / total
        clusters = len(counts)
        if clusters == 1:
            if total < 2:
                return torch.zeros_like(mean)
            variance = (self._squares / total - mean.square()).clamp(min=0) * total / (total - 1)
            return (variance / total).sqrt()
        residual = sums - mean * counts[:, None]
        return (residual.square().sum(0) * clusters / (clusters - 1)).sqrt() / total

    def bootstrap_means(self, draws: int, seed: int = 0) -> Tensor:
        """Means of ``draws`` resamples of whole responses, (draws, K) float64."""
        sums, counts = self.table()
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(counts), (draws, len(counts)), generator=generator)
        weights = torch.zeros(draws, len(counts), dtype=torch.float64)
        weights.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        return (weights @ sums) / (weights @ counts)[:, None]


def round_list(values: Tensor, digits: int = 6) -> list[float]:
    """A plain list for JSON; refuses what JSON cannot hold."""
    found = [round(float(v), digits) for v in values]
    if not all(math.isfinite(v) for v in found):
        raise ValueError("a statistic is not finite")
    return found
