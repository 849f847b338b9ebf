"""results.json: what graded responses come to. No torch; reads and writes plain rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bupo.evaluate.metrics import PASS_KS, bootstrap, pass_curve

SCHEMA = 1


def task_results(rows: Iterable[Mapping[str, Any]], *, k: int, seed: int = 0) -> dict[str, Any]:
    """Results of one task from its graded responses.

    Args:
        rows: with ``problem_id``, ``reward``, ``status``, ``length`` (tokens) and ``finished``.
        k: the K of Avg@K. Avg@K is the mean over problems of the share of right samples; its expectation does not
            depend on K, so all samples of a problem are used, also when there are more than K.

    Problems whose gold answer cannot be read are left out and listed. Every problem must have the same number of
    samples.
    """
    by_problem: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_problem[str(row["problem_id"])].append(row)
    left_out = [name for name, group in by_problem.items() if group[0]["status"] == "bad_gold"]
    kept = {name: group for name, group in by_problem.items() if name not in set(left_out)}
    result: dict[str, Any] = {"n_problems": len(kept), "left_out": left_out}
    if not kept:
        return {**result, "n_samples": 0, "reason": "no problem has a gold answer that can be read"}
    sizes = {len(group) for group in kept.values()}
    if len(sizes) != 1:
        raise ValueError(f"problems have different numbers of samples: {sorted(sizes)}")
    (n,) = sizes
    ks = sorted({*PASS_KS, k})
    correct = [sum(row["status"] == "correct" for row in group) for group in kept.values()]
    rewards = [float(np.mean([row["reward"] for row in group])) for group in kept.values()]
    lengths = [float(np.mean([row["length"] for row in group])) for group in kept.values()]
    flat = [row for group in kept.values() for row in group]

    def rate(status: str) -> float:
        return sum(row["status"] == status for row in flat) / len(flat)

    return {
        **result,
        "n_samples": n,
        "avg_at_k": {"k": k, **bootstrap(np.asarray(correct) / n, seed=seed).to_json()},
        "pass_at_k": [{"k": size, **estimate.to_json()} for size, estimate in pass_curve(correct, n, ks=ks, seed=seed)],
        "mean_reward": bootstrap(rewards, seed=seed).to_json(),
        "mean_length": float(np.mean(lengths)),
        "truncation_rate": sum(not row["finished"] for row in flat) / len(flat),
        "unparsable_rate": rate("unparsable"),
        "timeout_rate": rate("timeout"),
        "problems": [
            {"id": name, "correct": c, "reward": reward} for name, c, reward in zip(kept, correct, rewards, strict=True)
        ],
    }


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """A small table for the terminal."""
    lines = [
        f"{'task':<28} {'problems':>8} {'Avg@K':>26} {'Pass@K':>22} {'length':>8} {'cut off':>8} {'no answer':>10}"
    ]
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
            lines.append(f"  left out, gold answer cannot be read: {len(task['left_out'])} ({shown})")
        if not math.isclose(task["timeout_rate"], 0):
            lines.append(
                f"  grading took too long for {100 * task['timeout_rate']:.2f} % of the answers (counted as wrong)"
            )
    return lines
