"""Avg@K, unbiased Pass@K, their confidence intervals, and a paired comparison of two models.

Everything here works on numbers of right answers; no torch. A problem is the unit that is drawn at random: samples of
one problem are not independent of each other, so intervals and tests resample problems (with all their samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PASS_KS = (1, 4, 16, 64, 256)  # of the paper, arXiv 2512.19673
RESAMPLES = 10_000


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of ``k`` samples is right, estimated without bias from ``correct`` of ``n``.

    ``1 - C(n - c, k) / C(n, k)``, computed as ``1 - prod_{i=0}^{k-1} (n - c - i) / (n - i)`` so that no binomial
    coefficient overflows. It is the mean over all subsets of ``k`` of the ``n`` samples of "this subset has a right
    one"; taking ``1 - (1 - c/n)^k`` instead would be biased, and more so for the small c/n where Pass@K matters.

    Raises:
        ValueError: not ``0 <= correct <= n`` and ``1 <= k <= n``.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    if k > n - correct:
        return 1.0
    # the shorter of the two equal products: C(n-c, k)/C(n, k) = C(n-k, c)/C(n, c)
    length, other = (k, correct) if k <= correct else (correct, k)
    steps = np.arange(length)
    return float(1.0 - np.prod((n - other - steps) / (n - steps)))


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with a 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        return {"mean": self.mean, "ci95": [self.low, self.high]}


def bootstrap(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Estimate:
    """Mean of one value per problem and its percentile bootstrap interval.

    Args:
        values: (problems,); for Avg@K the share of right samples, for Pass@K the problem's `pass_at_k`.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError("bootstrap needs one value per problem and at least one problem")
    means = _resampled_means(data, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = float(data.mean())
    return Estimate(mean, min(float(low), mean), max(float(high), mean))


def pass_curve(correct: ArrayLike, n: int, *, ks: Sequence[int] = PASS_KS, seed: int = 0) -> list[tuple[int, Estimate]]:
    """Pass@K over problems for every K of ``ks`` that ``n`` samples allow.

    Args:
        correct: (problems,) right answers of ``n``.
    """
    counts = [int(c) for c in np.asarray(correct)]
    return [(k, bootstrap([pass_at_k(n, c, k) for c in counts], seed=seed)) for k in ks if k <= n]


@dataclass(frozen=True)
class Comparison:
    """Second minus first on the same problems."""

    difference: float
    low: float
    high: float
    p_value: float
    problems: int

    def to_json(self) -> dict[str, object]:
        return {
            "difference": self.difference,
            "ci95": [self.low, self.high],
            "p_value": self.p_value,
            "problems": self.problems,
        }


def compare(first: ArrayLike, second: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Paired comparison of two models on the same problems: ``second - first``.

    The interval resamples problems. The p-value is of the two-sided sign-flip (paired permutation) test: if the two
    models were interchangeable, each problem's difference could as well have had the other sign. It needs no
    assumption about the distribution of the differences.

    Args:
        first: (problems,) a value per problem (share of right samples, or Pass@K).
        second: (problems,) of the other model, in the same order.

    Raises:
        ValueError: not equally long, or empty.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired comparison needs the same problems: {a.size} and {b.size} given")
    differences = b - a
    estimate = bootstrap(differences, resamples=resamples, seed=seed)
    observed = abs(float(differences.mean()))
    generator = np.random.default_rng(seed + 1)
    extreme = 0
    for size in _blocks(resamples, differences.size):
        signs = generator.integers(0, 2, size=(size, differences.size)) * 2 - 1
        extreme += int(np.sum(np.abs((signs * differences).mean(axis=1)) >= observed - 1e-12))
    p_value = (extreme + 1) / (resamples + 1)
    return Comparison(estimate.mean, estimate.low, estimate.high, p_value, int(differences.size))


def _resampled_means(data: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    parts = [
        data[generator.integers(0, data.size, size=(size, data.size))].mean(axis=1)
        for size in _blocks(resamples, data.size)
    ]
    return np.concatenate(parts)


def _blocks(resamples: int, width: int) -> list[int]:
    """Sizes that add up to ``resamples`` and keep one block below about 32 MiB."""
    size = max(1, 4_000_000 // max(1, width))
    return [min(size, resamples - start) for start in range(0, resamples, size)]
