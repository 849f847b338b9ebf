"""Means over tokens with standard errors clustered by response, because a response's tokens are correlated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class ResponseSums(NamedTuple):
    """Sums (K,) and sums of squares over the tokens read, their number, and the number of tokens they stand for."""

    total: Tensor
    squares: Tensor
    read: int
    size: int


class ClusterMeans:
    """Means over tokens of K quantities, with standard errors clustered by response.

    The mean is the ratio ``sum_i S_i / sum_i n_i`` over responses i; where only some of a response's n_i tokens are
    read, ``S_i`` is estimated by ``n_i`` times their mean. Its standard error is the linearised one,
    ``sqrt(R/(R-1) sum_i (S_i - mean n_i)^2) / N``, that of another sample of R responses. With a single response, it is
    the standard error over its tokens; with a single token, it is unknown (NaN).

    Attributes:
        rows: the sums of each response by its index; two rows (K,) per response are all that is kept.
    """

    def __init__(self, rows: Iterable[dict[int, ResponseSums]] = ()):
        self.rows = {index: row for part in rows for index, row in part.items()}

    @classmethod
    def of(cls, values: Tensor, counts: list[int], sizes: list[int] | None = None) -> ClusterMeans:
        """The means of values (K, N), response by response: ``counts`` tokens of each, which stand for ``sizes``."""
        means = cls()
        for index, part in enumerate(values.split(counts, dim=-1)):
            means.add(part, index, sizes[index] if sizes else None)
        return means

    def add(self, values: Tensor, response: int, size: int | None = None) -> None:
        """Add values (K, n) of tokens of one response, which stand for ``size`` tokens (default: for themselves)."""
        values, n = values.detach().to("cpu", torch.float64), values.shape[-1]
        self.rows[response] = ResponseSums(values.sum(-1), values.square().sum(-1), n, size or n)

    @property
    def tokens(self) -> int:
        """Number of tokens read."""
        return sum(row.read for row in self.rows.values())

    @property
    def method(self) -> str:
        """How the standard errors are computed, for the result file."""
        return "clustered by response" if len(self.rows) > 1 else "over tokens (a single response)"

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means over all tokens and their standard errors, each (K,) float64."""
        rows = [self.rows[index] for index in sorted(self.rows)]
        sums = torch.stack([r.total if r.read == r.size else r.total * (r.size / r.read) for r in rows])
        counts = torch.tensor([r.size for r in rows], dtype=torch.float64)
        mean = sums.sum(0) / counts.sum()
        if len(rows) > 1:
            residual = sums - mean * counts[:, None]
            return mean, (residual.square().sum(0) * len(rows) / (len(rows) - 1)).sqrt() / counts.sum()
        row = rows[0]
        if row.read == 1:
            return mean, torch.full_like(mean, math.nan)
        variance = (row.squares / row.read - (row.total / row.read).square()).clamp(min=0)
        return mean, (variance / (row.read - 1)).sqrt()


def round_list(values: Tensor, digits: int = 6) -> list[float]:
    """Round finite values to a plain list for JSON."""
    return [round(value, digits) for value in values.tolist()]


def round_errors(errors: Tensor) -> list[float | None]:
    """Round standard errors to a plain list for JSON; None where the error is unknown (NaN)."""
    return [None if math.isnan(error) else round(error, 6) for error in errors.tolist()]
