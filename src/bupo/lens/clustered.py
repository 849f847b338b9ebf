"""Means over tokens with standard errors clustered by response, because a response's tokens are correlated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Response:
    """Sums (K,) over the tokens read so far, their number, and the number of tokens that they stand for."""

    total: Tensor
    squares: Tensor
    read: int
    size: int


class ClusterMeans:
    """Running means over tokens of K quantities, with standard errors clustered by response.

    Only two rows (K,) of sums are kept per response. The mean is the ratio ``sum_i S_i / sum_i n_i`` over responses i;
    where only some of a response's n_i tokens are read, ``S_i`` is estimated by ``n_i`` times their mean. Its standard
    error is the linearised one, ``sqrt(R/(R-1) sum_i (S_i - mean n_i)^2) / N``, that of another sample of R responses.
    With a single response, it is the standard error over its tokens; with a single token, it is unknown (NaN).
    """

    def __init__(self, quantities: int):
        self.quantities = quantities
        self._responses: dict[int, _Response] = {}

    def add(self, values: Tensor, *, response: int | None = None, size: int | None = None) -> None:
        """Add values (K, n), float64, of tokens of one response.

        Args:
            response: its number (default: a new one).
            size: number of tokens that the ``values`` stand for (default: their own number).
        """
        values = values.detach().to("cpu", torch.float64)
        number = len(self._responses) if response is None else response
        n = values.shape[-1]
        self._responses[number] = _Response(values.sum(-1), values.square().sum(-1), n, n if size is None else size)

    @property
    def tokens(self) -> int:
        """Number of tokens read."""
        return sum(row.read for row in self._responses.values())

    @property
    def responses(self) -> int:
        """Number of responses with tokens read."""
        return len(self._responses)

    @property
    def method(self) -> str:
        """How the standard errors were computed, for the result file."""
        return "clustered by response" if self.responses > 1 else "over tokens (a single response)"

    def _table(self) -> tuple[Tensor, Tensor]:
        """Sums per response (R, K) and the number of tokens that they stand for (R,)."""
        rows = [self._responses[number] for number in sorted(self._responses)]
        sums = [row.total if row.read == row.size else row.total * (row.size / row.read) for row in rows]
        return torch.stack(sums), torch.tensor([row.size for row in rows], dtype=torch.float64)

    def mean(self) -> Tensor:
        """Means over all tokens, (K,) float64."""
        sums, counts = self._table()
        return sums.sum(0) / counts.sum()

    def standard_error(self) -> Tensor:
        """Standard errors of :meth:`mean`, (K,) float64; NaN where a single token was read."""
        sums, counts = self._table()
        clusters, total = len(counts), counts.sum()
        if clusters == 1:
            (row,) = self._responses.values()
            variance = (row.squares / row.read - (row.total / row.read).square()).clamp(min=0)
            return (variance / (row.read - 1)).sqrt() if row.read > 1 else torch.full_like(row.total, math.nan)
        residual = sums - sums.sum(0) / total * counts[:, None]
        return (residual.square().sum(0) * clusters / (clusters - 1)).sqrt() / total

    def state(self) -> dict[int, Any]:
        """The sums of every response, to be sent to another process."""
        return dict(self._responses)

    @classmethod
    def merged(cls, quantities: int, states: list[dict[int, Any]]) -> ClusterMeans:
        """Join the means of several processes; each response belongs to one of them."""
        means = cls(quantities)
        for state in states:
            means._responses |= state
        return means


def round_list(values: Tensor, digits: int = 6) -> list[float]:
    """Round finite values to a plain list for JSON."""
    rounded = [round(float(v), digits) for v in values]
    if not all(math.isfinite(v) for v in rounded):
        raise ValueError("a statistic is not finite")
    return rounded


def round_errors(errors: Tensor, digits: int = 6) -> list[float | None]:
    """Round standard errors to a plain list for JSON; None where the error is unknown (NaN)."""
    return [None if math.isnan(error) else round(error, digits) for error in errors.tolist()]
