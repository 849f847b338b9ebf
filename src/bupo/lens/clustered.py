"""Means over tokens with honest standard errors: a response's tokens are correlated, so responses are the clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Response:
    """Sums (K,) over the tokens drawn so far, how many these are, and how many tokens the response has."""

    total: Tensor
    squares: Tensor
    drawn: int
    size: int


class ClusterMeans:
    """Running means over tokens of K quantities, with standard errors clustered by response.

    Only sums are kept, two rows (K,) a response. Where all tokens are read, the mean is the ratio
    ``sum_i S_i / sum_i n_i`` over responses i; where only some are drawn, ``S_i`` is estimated by ``n_i`` times their
    mean. Its standard error is the linearised one, ``sqrt(R/(R-1) sum_i (S_i - mean n_i)^2) / N``: that of another set
    of R responses. With a single response there is nothing to cluster, and the standard error over its tokens is given.
    """

    def __init__(self, quantities: int):
        self.quantities = quantities
        self._responses: dict[int, _Response] = {}

    def add(self, values: Tensor, *, response: int | None = None, size: int | None = None) -> None:
        """Take values (K, n), float64, of tokens of one response.

        Args:
            response: its number; a new one by default. Tokens of a response may come in several calls.
            size: how many tokens it has, where ``values`` are some of them drawn at random.
        """
        values = values.detach().to("cpu", torch.float64)
        number = len(self._responses) if response is None else response
        row = self._responses.setdefault(number, self._nothing())
        row.total = row.total + values.sum(-1)
        row.squares = row.squares + values.square().sum(-1)
        row.drawn += values.shape[-1]
        row.size = row.drawn if size is None else size

    def _nothing(self) -> _Response:
        zeros = torch.zeros(self.quantities, dtype=torch.float64)
        return _Response(zeros, zeros, 0, 0)

    @property
    def tokens(self) -> int:
        """How many tokens were read."""
        return sum(row.drawn for row in self._responses.values())

    @property
    def responses(self) -> int:
        return len(self._responses)

    @property
    def method(self) -> str:
        """How the standard errors were computed, for the result file."""
        return "clustered by response" if self.responses > 1 else "over tokens (a single response)"

    def _rows(self) -> list[_Response]:
        return [self._responses[number] for number in sorted(self._responses)]

    def table(self) -> tuple[Tensor, Tensor]:
        """Per-response sums (R, K) over all their tokens, estimated where some were drawn, and token counts (R,)."""
        rows = self._rows()
        sums = [row.total if row.drawn == row.size else row.total * (row.size / row.drawn) for row in rows]
        return torch.stack(sums), torch.tensor([row.size for row in rows], dtype=torch.float64)

    def mean(self) -> Tensor:
        """Means over all tokens, (K,) float64."""
        sums, counts = self.table()
        return sums.sum(0) / counts.sum()

    def standard_error(self) -> Tensor:
        """Standard errors of :meth:`mean` as that of the model's responses at large, (K,) float64."""
        sums, counts = self.table()
        total = counts.sum()
        mean = sums.sum(0) / total
        clusters = len(counts)
        if clusters == 1:
            (row,) = self._rows()
            return (_variance(row) / row.drawn).sqrt()
        residual = sums - mean * counts[:, None]
        return (residual.square().sum(0) * clusters / (clusters - 1)).sqrt() / total

    def sampling_error(self) -> Tensor:
        """Standard errors of :meth:`mean` as that of *these* responses' tokens, of which some were drawn, (K,) float64.

        Stratified by response, finite-population corrected: ``1/N sqrt(sum_i n_i^2 (1 - m_i/n_i) s_i^2 / m_i)``
        for ``m_i`` of ``n_i`` tokens drawn; zero where all were.
        """
        rows = self._rows()
        terms = [r.size**2 * (1 - r.drawn / r.size) * _variance(r) / r.drawn for r in rows]
        return torch.stack(terms).sum(0).sqrt() / sum(r.size for r in rows)

    def bootstrap_means(self, draws: int, seed: int = 0) -> Tensor:
        """Means of ``draws`` resamples of whole responses, (draws, K) float64."""
        sums, counts = self.table()
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(counts), (draws, len(counts)), generator=generator)
        weights = torch.zeros(draws, len(counts), dtype=torch.float64)
        weights.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        return (weights @ sums) / (weights @ counts)[:, None]

    # -- several processes -----------------------------------------------------------------------------------------

    def state(self) -> dict[int, tuple[Any, ...]]:
        """Everything known, to be sent to another process."""
        return {n: (r.total, r.squares, r.drawn, r.size) for n, r in self._responses.items()}

    @classmethod
    def merged(cls, quantities: int, states: list[dict[int, tuple[Any, ...]]]) -> ClusterMeans:
        """The means of several processes' responses together; each response belongs to one of them."""
        found = cls(quantities)
        for state in states:
            for number, values in state.items():
                found._responses[number] = _Response(*values)
        return found


def _variance(row: _Response) -> Tensor:
    """Sample variance (K,) of the tokens drawn."""
    if row.drawn < 2:
        return torch.zeros_like(row.total)
    mean = row.total / row.drawn
    return (row.squares / row.drawn - mean.square()).clamp(min=0) * row.drawn / (row.drawn - 1)


def round_list(values: Tensor, digits: int = 6) -> list[float]:
    """A plain list for JSON; refuses what JSON cannot hold."""
    found = [round(float(v), digits) for v in values]
    if not all(math.isfinite(v) for v in found):
        raise ValueError("a statistic is not finite")
    return found
