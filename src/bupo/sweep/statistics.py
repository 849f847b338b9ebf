"""Statistics of runs with several seeds: intervals over seeds, problems and both, paired differences, Holm, power.

Scores are arrays of S seeds x P problems, one value per problem: its share of correct samples, or its Pass@K. All
intervals and tests are two-sided at 95 %. The interval over seeds covers what other seeds would give, the one over
problems what other problems would, and the third both.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from bupo.errors import InputError
from bupo.evaluate.metrics import bootstrap, pass_at_k
from bupo.sweep.rows import START, Row, Rows

Interval = tuple[float, float]
Scores = np.ndarray[Any, Any]
_RESAMPLES, _NUMBERS = 10_000, 20_000_000  # the most of each; fewer resamples for thousands of problems


def problem_scores(row: Row, task: str, metric: str = "avg") -> list[float]:
    """Avg@K (the share of correct samples) or Pass@K (whether any sample is correct) of every problem of one run."""
    samples, correct = row["tasks"][task]["samples"], map(int, row["tasks"][task]["correct"].split())
    if metric == "avg":
        return [count / samples for count in correct]
    return [pass_at_k(samples, count, samples) for count in correct]


def scores(by_seed: Mapping[int, Row], task: str, seeds: Sequence[int], metric: str = "avg") -> Scores:
    """The scores (S, P) of an arm; `InputError` if two seeds were not evaluated on as many problems."""
    found = [problem_scores(by_seed[seed], task, metric) for seed in seeds]
    for seed, one in zip(seeds, found, strict=True):
        if len(one) != len(found[0]):
            sizes = f"{len(found[0])} problems with seed {seeds[0]} and {len(one)} with seed {seed}"
            raise InputError(f"arm {by_seed[seed]['arm']} was evaluated on {task} with {sizes}")
    return np.array(found)


def student(values: Sequence[float] | Scores) -> Interval | None:
    """Student's interval of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = float(np.mean(values))
    half = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def over_problems(values: Scores) -> Interval:
    """Bootstrap interval over problems of the mean of scores (S, P)."""
    low, high = bootstrap(values.mean(axis=0))["ci95"]
    return low, high


def over_both(values: Scores) -> Interval | None:
    """Bootstrap interval over seeds and problems of the mean of scores (S, P); None for a single seed."""
    return _ends(_resampled(values)) if len(values) > 1 else None


def over_both_of_ratio(above: Scores, below: Scores) -> Interval | None:
    """`over_both` of the ratio of two means; None where the lower one is not shown to differ from zero."""
    ends = over_both(below)
    return None if ends is None or ends[0] <= 0 <= ends[1] else _ends(_resampled(above) / _resampled(below))


def _ends(values: Scores) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resampled(values: Scores) -> Scores:
    """Means of scores (S, P) whose seeds and problems are drawn with replacement, the same draws for the same shape.

    The noise of sampling varies the means of seeds and of problems alike. It is counted once, with the seeds: what the
    problems add is shrunk to the part of their variance beyond it. (Means over drawn seeds and problems at once, the
    pigeonhole bootstrap, doi 10.1214/07-AOAS122, count it three times.) Few seeds vary too little between draws: their
    weights are widened until the interval over seeds alone is about Student's (expanded, arXiv 1411.5279).
    """
    (seeds, problems), mean = values.shape, values.mean()
    of_seeds, of_problems = values.mean(axis=1), values.mean(axis=0)
    noise = ((values - of_seeds[:, None] - of_problems + mean) ** 2).sum() / max(1, (seeds - 1) * (problems - 1))
    variance = of_problems.var(ddof=1) if problems > 1 else 0.0
    share = math.sqrt(max(0.0, 1 - noise / seeds / variance)) if variance > 0 else 0.0
    resamples = max(1000, min(_RESAMPLES, _NUMBERS // max(seeds, problems)))
    drawn = _weights(problems, resamples, 1) @ of_problems if share else mean
    return _weights(seeds, resamples, 0) @ of_seeds + share * (drawn - mean)


@lru_cache(4)
def _weights(n: int, resamples: int, seed: int) -> Scores:
    """``resamples`` rows of ``n`` weights that add up to 1."""
    drawn = np.random.default_rng(seed).integers(0, n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n * resamples).reshape(resamples, n)
    wider = scipy.stats.t.ppf(0.975, n - 1) / scipy.stats.norm.ppf(0.975) * math.sqrt(n / (n - 1))
    return ((1 + wider * (counts - 1)) / n).astype(np.float32)


def paired_p(differences: Sequence[float] | Scores) -> float | None:
    """The p-value of the paired t-test over seeds; None where there are fewer than two, or all are the same."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.ptp(values) < 1e-12:
        return None
    return float(scipy.stats.ttest_1samp(values, 0).pvalue)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjusted p-values of a family, by name; what has no p-value keeps none and does not count."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    least = 0.0
    for place, (p, name) in enumerate(known):
        adjusted[name] = least = max(least, min(1.0, (len(known) - place) * p))
    return adjusted


def describe(values: Scores) -> dict[str, Any]:
    """Mean of scores (S, P) and its three intervals."""
    over_seeds = student(values.mean(axis=1))
    found = {"mean": float(values.mean()), "ci_seeds": over_seeds, "ci_problems": over_problems(values)}
    return {**found, "ci_both": over_both(values)}


def baseline_of(rows: Rows) -> str | None:
    """The arm that others are compared with: ``grpo``, else the first that was trained."""
    return next((arm for arm in ("grpo", *rows) if arm in rows and arm != START), None)


def in_order(rows: Rows) -> Rows:
    """The model before training, the baseline, then the other arms in the order of their rows."""
    return {arm: rows[arm] for arm in sorted(rows, key=lambda arm: (arm != START, arm != baseline_of(rows)))}


def paired(
    one: Mapping[int, Row], other: Mapping[int, Row], task: str, seeds: Sequence[int], metric: str = "avg"
) -> Scores:
    """Differences (S, P) of two arms, paired by problem and seed; the model before training has one seed."""
    untrained = next(iter(other.values())).get("arm") == START
    first = scores(one, task, seeds, metric)
    second = scores(other, task, [min(other)] if untrained else seeds, metric)
    if first.shape[1] != second.shape[1]:
        names = [next(iter(arm.values()))["arm"] for arm in (one, other)]
        sizes = f"{first.shape[1]} and {second.shape[1]} problems of {task}"
        raise InputError(f"arms {names[0]} and {names[1]} were evaluated on {sizes}, so they cannot be paired")
    return first - second


def compare_arms(rows: Rows, task: str, baseline: str | None) -> list[dict[str, Any]]:
    """Every arm's mean and intervals, and its difference from the baseline; Holm's family are a task's arms."""
    rows, found = _of_task(rows, task), []
    for arm, own in rows.items():
        seconds = [row["update_seconds"] for row in own.values() if row.get("update_seconds") is not None]
        one = {"arm": arm, "seeds": sorted(own), **describe(scores(own, task, sorted(own))), "difference": None}
        one |= {"update_seconds": float(np.mean(seconds)) if seconds else None, "ci_update_seconds": student(seconds)}
        base = rows.get(baseline or "", {})
        if arm not in (START, baseline) and (common := sorted(own.keys() & base.keys())):
            away = paired(own, base, task, common)
            one["difference"] = {**describe(away), "seeds": common, "p": paired_p(away.mean(axis=1))}
        found.append(one)
    differences = {one["arm"]: one["difference"] for one in found if one["difference"]}
    for arm, p in holm({arm: away["p"] for arm, away in differences.items()}).items():
        differences[arm]["p_holm"] = p
    return found


def layer_map(rows: Rows, task: str, baseline: str | None) -> list[dict[str, Any]]:
    """What training one layer alone adds to the start, and its share of what the baseline adds, layer by layer.

    Its arms differ from the baseline in nothing but the one layer that they train; it is empty for fewer than two.
    """
    rows = _of_task(rows, task)
    base, start = rows.get(baseline or "", {}), rows.get(START, {})
    chosen = {arm: _one_layer(next(iter(own.values()))) for arm, own in rows.items() if arm != START}
    trained, alike = chosen.get(baseline or "", (0, {}))
    layers = sorted((layer, arm) for arm, (layer, rest) in chosen.items() if layer and rest == alike)
    found: list[dict[str, Any]] = []
    for layer, arm in layers if start and trained is None and len(layers) > 1 else ():
        seeds, common = sorted(rows[arm]), sorted(rows[arm].keys() & base.keys())
        row = {"layer": layer, "seeds": seeds, **describe(paired(rows[arm], start, task, seeds))}
        found.append({**row, "share": None, "ci_share": None})
        if common:
            own, whole = (paired(by_seed, start, task, common) for by_seed in (rows[arm], base))
            if (ends := over_both_of_ratio(own, whole)) is not None:
                found[-1] |= {"share": float(own.mean() / whole.mean()), "ci_share": ends}
    return found


def _of_task(rows: Rows, task: str) -> Rows:
    """The rows that have a task."""
    found = {arm: {s: row for s, row in own.items() if task in row["tasks"]} for arm, own in rows.items()}
    return {arm: own for arm, own in found.items() if own}


def _one_layer(row: Row) -> tuple[int | None, dict[str, Any]]:
    """The layer that a run trained alone, and its other changes without those of an internal phase of no length."""
    rest = {key: value for key, value in row["changes"].items() if key != "trained_layers"}
    if rest.get("internal_steps") == 0:
        rest = {key: value for key, value in rest.items() if not key.startswith("internal_")}
    chosen = row["changes"].get("trained_layers")
    chosen = chosen[0] if isinstance(chosen, list) and len(chosen) == 1 else chosen
    return int(chosen) if re.fullmatch(r"\d+", str(chosen)) else None, rest


def power_of(difference: float, deviation: float, seeds: int) -> float:
    """The probability that the paired t-test over ``seeds`` shows a true ``difference``.

    ``deviation`` is the standard deviation of the paired differences over seeds.
    """
    edge, away = scipy.special.stdtrit(seeds - 1, 0.975), math.sqrt(seeds) * difference / deviation
    above, below = (scipy.special.nctdtr(seeds - 1, away, end) for end in (edge, -edge))
    return float(1 - above + np.nan_to_num(below))  # NaN where it is negligible


def seeds_needed(difference: float, deviation: float, power: float) -> int:
    """The smallest number of seeds, from 2, with which a true difference is shown with the given probability."""
    low, high = 1, 2  # too few, and enough once the loop ends
    while power_of(difference, deviation, high) < power:
        low, high = high, 2 * high
    return low + 1 + bisect_left(range(low + 1, high), power, key=lambda n: power_of(difference, deviation, n))


def detectable(seeds: int, deviation: float, power: float) -> float:
    """The smallest true difference that this many seeds show with the given probability."""
    high = deviation
    while power_of(high, deviation, seeds) < power:
        high *= 2
    return float(scipy.optimize.brentq(lambda d: power_of(d, deviation, seeds) - power, 0, high))


def deviation_of(differences: Sequence[float] | Scores) -> tuple[float, Interval]:
    """The standard deviation of differences over seeds, with its chi-square interval."""
    n, deviation = len(differences), float(np.std(differences, ddof=1))
    low, high = (deviation * math.sqrt((n - 1) / scipy.stats.chi2.ppf(p, n - 1)) for p in (0.975, 0.025))
    return deviation, (low, high)
