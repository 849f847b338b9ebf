"""Summarises graded responses as the content of ``results.json``. This module loads no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bupo.evaluate.metrics import PASS_KS, bootstrap, pass_curve

SCHEMA = 1


def task_results(rows: Iterable[Mapping[str, Any]], *, k: int, seed: int = 0) -> dict[str, Any]:
    """Summarise the graded responses of one task.

    Problems whose gold answer cannot be read are left out and listed.

    Args:
        rows: with ``problem_id``, ``reward``, ``status``, ``length`` (tokens) and ``finished``; the same number of
            samples for every problem.
        k: the K of Avg@K, the mean over problems of the share of correct samples. Its expectation does not depend on
            K, so all samples of a problem are used even if there are more than K.

    Raises:
        ValueError: the problems have different numbers of samples.
    """
    by_problem: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_problem[str(row["problem_id"])].append(row)
    left_out = [name for name, group in by_problem.items() if group[0]["status"] == "bad_gold"]
    kept = {name: group for name, group in by_problem.items() if name not in set(left_out)}
    result: dict[str, Any] = {"n_problems": len(kept), "left_out": left_out}
    if not kept:
        return {**result, "n_samples": 0, "reason": "no problem has a gold answer that can be read"}
    sizes = sorted({len(group) for group in kept.values()})
    if len(sizes) != 1:
        raise ValueError(f"problems have different numbers of samples: {sizes}")
    n = sizes[0]
    correct = [sum(row["status"] == "correct" for row in group) for group in kept.values()]
    rewards = [float(np.mean([row["reward"] for row in group])) for group in kept.values()]
    lengths = [float(np.mean([row["length"] for row in group])) for group in kept.values()]
    flat = [row for group in kept.values() for row in group]
    counts = Counter(row["status"] for row in flat)
    curve = pass_curve(correct, n, ks=sorted({*PASS_KS, k}), seed=seed)
    return {
        **result,
        "n_samples": n,
        "avg_at_k": {"k": k, **bootstrap(np.asarray(correct) / n, seed=seed).to_json()},
        "pass_at_k": [{"k": size, **estimate.to_json()} for size, estimate in curve],
        "mean_reward": bootstrap(rewards, seed=seed).to_json(),
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
    header = ("problems", "Avg@K", "Pass@K", "length", "cut off", "no answer")
    lines = ["{:<28} {:>8} {:>26} {:>22} {:>8} {:>8} {:>10}".format("task", *header)]
    for name, task in results["tasks"].items():
        if not task["n_samples"]:
            lines.append(f"{name:<28} {0:>8}  {task['reason']}")
            continue
        average, last = task["avg_at_k"], task["pass_at_k"][-1]
        low, high = average["ci95"]
        value = f"@{average['k']} {100 * average['mean']:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
        best = f"@{last['k']} {100 * last['mean']:.2f}"
        lines.append(
            f"{name:<28} {task['n_problems']:>8} {value:>26} {best:>22} {task['mean_length']:>8.0f} "
            f"{100 * task['truncation_rate']:>7.1f}% {100 * task['unparsable_rate']:>9.1f}%"
        )
        if task["left_out"]:
            shown = ", ".join(task["left_out"][:5]) + (", ..." if len(task["left_out"]) > 5 else "")
            lines.append(f"  left out, as the gold answer cannot be read: {len(task['left_out'])} ({shown})")
        if task["timeout_rate"]:
            lines.append(
                f"  {100 * task['timeout_rate']:.2f} % of the answers took too long to grade (counted as wrong)"
            )
    return lines
