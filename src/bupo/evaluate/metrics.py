"""Avg@K, unbiased Pass@K, their confidence intervals, and a paired comparison of two models, without torch.

Samples of one problem are not independent, so intervals and tests resample problems, each with all its samples.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

PASS_KS = (1, 4, 16, 64, 256)  # of the paper, arXiv 2512.19673
_BLOCK = 4_000_000  # numbers drawn at a time, 32 MiB


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate without bias the probability that at least one of ``k`` samples is correct, from ``correct`` of ``n``.

    This is ``1 - C(n - c, k) / C(n, k)``, computed as a product, in which no binomial coefficient overflows.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    if k > n - correct:
        return 1.0
    # the shorter of the two equal products: C(n-c, k)/C(n, k) = C(n-k, c)/C(n, c)
    length, other = sorted((k, correct))
    steps = np.arange(length)
    return float(1.0 - np.prod((n - other - steps) / (n - steps)))


def bootstrap(values: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Return the ``mean`` of one value per problem and its 95 % percentile bootstrap interval ``ci95``."""
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise ValueError("bootstrap needs one value per problem and at least one problem")
    mean = float(data.mean())
    if data.size == 1:
        return {"mean": mean, "ci95": [mean, mean]}
    drawing: Any = {"n_resamples": resamples, "batch": max(1, _BLOCK // data.size), "rng": np.random.default_rng(seed)}
    interval = scipy.stats.bootstrap((data,), np.mean, method="percentile", **drawing).confidence_interval
    return {"mean": mean, "ci95": [min(float(interval.low), mean), max(float(interval.high), mean)]}


def share_interval(values: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """`bootstrap` of shares between 0 and 1, wider where all are equal: resampling then says nothing of other problems.

    If ``n`` problems agree, at most a share ``1 - 0.025 ** (1 / n)`` of all problems differs (Clopper and Pearson), and
    each by no more than the range.
    """
    data, found = np.asarray(values, dtype=np.float64), bootstrap(values, seed=seed)
    if data.min() == data.max():
        mean, unseen = found["mean"], float(1 - 0.025 ** (1 / data.size))
        found["ci95"] = [mean * (1 - unseen), mean + (1 - mean) * unseen]
    return found


def compare(first: ArrayLike, second: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Compare two models on the same problems, one value per problem: the mean of ``second - first``.

    The p-value is that of the two-sided sign-flip (paired permutation) test. scipy's `permutation_test` draws the signs
    otherwise, which would change published p-values in the third digit.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired comparison needs the same problems, not {a.size} and {b.size}")
    differences = b - a
    interval = bootstrap(differences, resamples=resamples, seed=seed)["ci95"]
    difference, size = float(differences.mean()), differences.size
    generator, batch, extreme = np.random.default_rng(seed + 1), max(1, _BLOCK // size), 0
    for start in range(0, resamples, batch):
        signs = generator.integers(0, 2, size=(min(batch, resamples - start), size)) * 2 - 1
        extreme += int(np.sum(np.abs((signs * differences).mean(axis=1)) >= abs(difference) - 1e-12))
    p_value = (extreme + 1) / (resamples + 1)
    return {"difference": difference, "ci95": interval, "p_value": p_value, "problems": size}


def task_results(rows: Iterable[Mapping[str, Any]], *, k: int, seed: int = 0) -> dict[str, Any]:
    """Summarise the graded responses of one task; problems whose gold answer cannot be read are left out and listed.

    Avg@K is the mean over problems of the share of correct samples, of all samples even if there are more than ``k``.
    """
    kept: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        kept[str(row["problem_id"])].append(row)
    left_out = [name for name, group in kept.items() if group[0]["status"] == "bad_gold"]
    for name in left_out:
        del kept[name]
    result: dict[str, Any] = {"n_problems": len(kept), "left_out": left_out}
    if not kept:
        return {**result, "n_samples": 0, "reason": "no problem has a gold answer that can be read"}
    n, *others = sorted({len(group) for group in kept.values()})
    if others:
        raise ValueError(f"problems have different numbers of samples: {[n, *others]}")
    correct = [sum(row["status"] == "correct" for row in group) for group in kept.values()]
    rewards = [float(np.mean([row["reward"] for row in group])) for group in kept.values()]
    lengths = [float(np.mean([row["length"] for row in group])) for group in kept.values()]
    flat = [row for group in kept.values() for row in group]
    counts = Counter(row["status"] for row in flat)
    return {
        **result,
        "n_samples": n,
        "avg_at_k": {"k": k, **share_interval(np.asarray(correct) / n, seed=seed)},
        "pass_at_k": [
            {"k": size, **share_interval([pass_at_k(n, c, size) for c in correct], seed=seed)}
            for size in sorted({*PASS_KS, k})
            if size <= n
        ],
        "mean_reward": bootstrap(rewards, seed=seed),
        "mean_length": float(np.mean(lengths)),
        "truncation_rate": sum(not row["finished"] for row in flat) / len(flat),
        "unparsable_rate": counts["unparsable"] / len(flat),
        "timeout_rate": counts["timeout"] / len(flat),
        "problems": [
            {"id": name, "correct": c, "reward": reward} for name, c, reward in zip(kept, correct, rewards, strict=True)
        ],
    }


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """Format results as a small table for the terminal."""
    row = "{:<28} {:>8} {:>26} {:>22} {:>8} {:>8} {:>10}".format
    lines = [row("task", "problems", "Avg@K", "Pass@K", "length", "cut off", "no answer")]
    for name, task in results["tasks"].items():
        if not task["n_samples"]:
            lines.append(f"{name:<28} {0:>8}  {task['reason']}")
            continue
        average, last = task["avg_at_k"], task["pass_at_k"][-1]
        low, high = average["ci95"]
        value = f"@{average['k']} {100 * average['mean']:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
        best = f"@{last['k']} {100 * last['mean']:.2f}"
        shares = (f"{100 * task[rate]:.1f}%" for rate in ("truncation_rate", "unparsable_rate"))
        lines.append(row(name, task["n_problems"], value, best, f"{task['mean_length']:.0f}", *shares))
        if out := task["left_out"]:
            shown = ", ".join(out[:5]) + (", ..." if len(out) > 5 else "")
            lines.append(f"  left out, as the gold answer cannot be read: {len(out)} ({shown})")
        if late := task["timeout_rate"]:
            lines.append(f"  {100 * late:.2f} % of the answers took too long to grade (counted as wrong)")
    return lines
