"""Avg@K, unbiased Pass@K, their confidence intervals, and a paired comparison of two models.

Everything here works on numbers of correct answers and loads no torch. Samples of one problem are not independent, so
intervals and tests resample problems, each with all its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

PASS_KS = (1, 4, 16, 64, 256)  # of the paper, arXiv 2512.19673
RESAMPLES = 10_000
_BLOCK = 4_000_000  # numbers drawn at a time, 32 MiB


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate without bias the probability that at least one of ``k`` samples is correct, from ``correct`` of ``n``.

    This is ``1 - C(n - c, k) / C(n, k)``, the share of the subsets of ``k`` samples that contain a correct one. It is
    computed as ``1 - prod_{i=0}^{k-1} (n - c - i) / (n - i)``, so that no binomial coefficient overflows. The plug-in
    estimate ``1 - (1 - c/n)^k`` would be biased, most of all for the small c/n where Pass@K matters.

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


def bootstrap(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return the mean of one value per problem and its percentile bootstrap interval.

    Args:
        values: (problems,); for Avg@K the share of correct samples, for Pass@K the problem's `pass_at_k`.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError("bootstrap needs one value per problem and at least one problem")
    mean = float(data.mean())
    if data.size == 1:
        return Estimate(mean, mean, mean)
    generator, batch = np.random.default_rng(seed), max(1, _BLOCK // data.size)
    interval = scipy.stats.bootstrap(
        (data,), np.mean, n_resamples=resamples, batch=batch, rng=generator, method="percentile"
    ).confidence_interval
    return Estimate(mean, min(float(interval.low), mean), max(float(interval.high), mean))


def pass_curve(correct: ArrayLike, n: int, *, ks: Sequence[int] = PASS_KS, seed: int = 0) -> list[tuple[int, Estimate]]:
    """Return Pass@K over problems for every K of ``ks`` that ``n`` samples allow.

    Args:
        correct: (problems,) numbers of correct samples out of ``n``.
    """
    counts = [int(c) for c in np.asarray(correct)]
    return [(k, bootstrap([pass_at_k(n, c, k) for c in counts], seed=seed)) for k in ks if k <= n]


@dataclass(frozen=True)
class Comparison:
    """The second model minus the first on the same problems."""

    difference: float
    low: float
    high: float
    p_value: float
    problems: int

    def to_json(self) -> dict[str, object]:
        interval = [self.low, self.high]
        return {"difference": self.difference, "ci95": interval, "p_value": self.p_value, "problems": self.problems}


def compare(first: ArrayLike, second: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare two models on the same problems: ``second - first``.

    The interval resamples problems. The p-value is that of the two-sided sign-flip (paired permutation) test: if the
    two models were interchangeable, the difference of each problem could as well have the other sign. The test assumes
    nothing about the distribution of the differences. scipy's `permutation_test` draws the signs otherwise, which would
    change published p-values in the third digit.

    Args:
        first: (problems,) one value per problem (share of correct samples, or Pass@K).
        second: (problems,) values of the other model, in the same order.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired comparison needs the same problems, not {a.size} and {b.size}")
    differences = b - a
    estimate = bootstrap(differences, resamples=resamples, seed=seed)
    observed = abs(float(differences.mean()))
    generator, batch, extreme = np.random.default_rng(seed + 1), max(1, _BLOCK // differences.size), 0
    for start in range(0, resamples, batch):
        signs = generator.integers(0, 2, size=(min(batch, resamples - start), differences.size)) * 2 - 1
        extreme += int(np.sum(np.abs((signs * differences).mean(axis=1)) >= observed - 1e-12))
    p_value = (extreme + 1) / (resamples + 1)
    return Comparison(estimate.mean, estimate.low, estimate.high, p_value, differences.size)
