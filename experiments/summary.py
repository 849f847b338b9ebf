"""Summaries of the rows of `bupo sweep`: means over seeds, and paired differences with 95 % intervals.

Run ``python -m experiments.summary`` for all tables whose lines exist, or add names of `TABLES`; each is written to
``experiments/results/NAME.json``.

Differences are paired by seed: both arms have the same prompts, order and held-out problems. ``ci95`` is Student's
interval over seeds, which covers other seeds but not other problems, and is wide for few seeds. ``ci95_problems`` is a
bootstrap over problems (of each problem's mean over the seeds of both arms), which covers other problems but not other
seeds. In the table ``guard``, the baseline is the fixed schedule with the best mean over the same seeds, which favours
the baseline.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bupo.run_folder import write_json
from bupo.sweep import statistics as statistics_of
from bupo.sweep.rows import Rows, read_rows
from bupo.sweep.statistics import problem_scores

RESULTS = Path(__file__).resolve().parent / "results"
SMALL, SMOLLM2 = "small.jsonl", "smollm2.jsonl"
STEPS = ["steps4", "bupo", "steps16", "steps30", "steps45"]
TABLES: dict[str, dict[str, Any]] = {
    "main": {"rows": SMALL, "arms": ["grpo", "rloo", "reinforce++", "bupo"], "seeds": 5},
    "main_smollm2": {"rows": SMOLLM2, "arms": ["grpo", "rloo", "reinforce++", "bupo"], "seeds": 5},
    "twice_smollm2": {"rows": SMOLLM2, "arms": ["grpo20", "bupo20"], "seeds": 5, "against": {"bupo20": "grpo20"}},
    "tuning_smollm2": {"rows": SMOLLM2, "arms": ["grpo", "rate3e-6", "rate3e-5"], "seeds": 1},
    "tuning": {"rows": SMALL, "arms": ["grpo", "rate1e-5", "rate6e-5", "rate1e-4"], "seeds": 1},
    "guard": {"rows": SMALL, "arms": ["grpo", *STEPS, "auto45"], "seeds": 3, "best_of": ["grpo", *STEPS]},
    "worth": {
        "rows": SMALL,
        "arms": ["bupo", "grpo37", "steps16", "grpo29", "steps30", "grpo15"],
        "seeds": 3,
        "against": {"bupo": "grpo37", "steps16": "grpo29", "steps30": "grpo15"},
    },
    "layers": {"rows": SMALL, "arms": ["grpo", "layer2", "bupo", "layer6", "layer8"], "seeds": 3},
    "reading": {"rows": SMALL, "arms": ["bupo", "norm", "temperature", "grpo"], "seeds": 3},
    "lenses": {
        "rows": SMALL,
        "arms": ["grpo", "bupo", "ridge4x8", "ridge4x16", "ridge6x45", "lower6", "ridge4x45"],
        "seeds": 10,
    },
    "upper": {"rows": "upper.jsonl", "arms": ["grpo", "upper4", "frozen1-4"], "seeds": range(40, 46)},
    "rates": {"rows": SMALL, "arms": ["bupo", "frozen4", "upper0.1", "grpo"], "seeds": 3},
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(row: dict[str, Any], task: str) -> dict[str, list[float]]:
    """Avg@K and Pass@K of every problem."""
    return {f"{kind}@{row['tasks'][task]['samples']}": problem_scores(row, task, kind) for kind in ("avg", "pass")}


def student(values: Sequence[float], scale: float = 1.0, digits: int = 4) -> dict[str, list[float]]:
    """Student's interval of the mean, times ``scale``, as ``{"ci95": [low, high]}``; empty for a single value."""
    ends = statistics_of.student(values)
    return {} if ends is None else {"ci95": [round(scale * end, digits) for end in ends]}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds and Student's interval, in percentage points."""
    mean = round(100 * statistics.fmean(values), 2)
    return {"mean": mean, "seeds": len(values), **student(values, scale=100, digits=2)}


def ratio(values: Sequence[float]) -> dict[str, Any]:
    """The geometric mean of ratios, and Student's interval of their logarithms."""
    logs = [math.log(value) for value in values]
    ends = statistics_of.student(logs) or ()
    return {"mean": round(math.exp(statistics.fmean(logs)), 3), "ci95": [round(math.exp(end), 3) for end in ends]}


def difference(
    one: dict[int, dict], other: dict[int, dict], task: str, metric: str, seeds: list[int]
) -> dict[str, Any]:
    """``one`` minus ``other`` in percentage points, paired by seed and by problem."""
    both = [seed for seed in seeds if seed in one and seed in other]
    away = statistics_of.paired(one, other, task, both, metric.split("@")[0])
    by_seed = away.mean(axis=1).tolist()
    ratios = [one[s]["update_seconds"] / other[s]["update_seconds"] for s in both if "update_seconds" in one[s]]
    return {
        **interval(by_seed),
        **({"update_time": ratio(ratios)} if ratios else {}),
        "ci95_problems": [round(100 * bound, 2) for bound in statistics_of.over_problems(away)],
        "each": {str(s): round(100 * v, 2) for s, v in zip(both, by_seed, strict=True)},
    }


def summarise_arm(by_seed: dict[int, dict], task: str, metric: str, seeds: list[int]) -> dict[str, Any]:
    """One arm's mean over ``seeds``, with the value of each seed."""
    rows = {seed: by_seed[seed] for seed in seeds if seed in by_seed}
    means = {seed: statistics.fmean(metrics_of(row, task)[metric]) for seed, row in rows.items()}
    ends = {str(seed): row["phase_end"] for seed, row in rows.items() if row.get("phase_end")}
    return {
        "changes": next(iter(rows.values()))["changes"],
        **interval(list(means.values())),
        "each": {str(s): round(100 * v, 2) for s, v in means.items()},
        "mean_length": round(statistics.fmean(row["tasks"][task]["mean_length"] for row in rows.values()), 2),
        **({"phase_end": ends} if ends else {}),
    }


def table(rows: Rows, settings: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    """Means of the arms in ``rows``, and their differences from the baseline.

    The baseline is the first arm, the best of the arms in ``best_of``, or given per arm in ``against``.
    """
    seeds = list(range(settings["seeds"]) if isinstance(settings["seeds"], int) else settings["seeds"])
    arms = {
        name: summarise_arm(rows[name], task, metric, seeds)
        for name in settings["arms"]
        if any(seed in rows.get(name, {}) for seed in seeds)
    }
    whole = [name for name, arm in arms.items() if arm["seeds"] == len(seeds)]
    candidates = [name for name in settings.get("best_of", settings["arms"][:1]) if name in whole]
    baseline = max(candidates, key=lambda name: arms[name]["mean"], default=None)
    against = settings.get("against") or ({} if baseline is None else dict.fromkeys(arms, baseline))
    pairs = {one: other for one, other in against.items() if one != other and one in arms and other in arms}
    result: dict[str, Any] = {"arms": arms, "baseline": settings.get("against", baseline)}
    if pairs:
        result["minus_baseline"] = {
            one: difference(rows[one], rows[other], task, metric, seeds) for one, other in pairs.items()
        }
    return result


def make(name: str) -> dict[str, Any] | None:
    """The content of a table, or None if its lines do not exist."""
    settings = TABLES[name]
    path = RESULTS / settings["rows"]
    rows = read_rows(path) if path.exists() else {}
    if "start" not in rows or not any(arm in rows for arm in settings["arms"]):
        return None
    start = rows["start"][0]
    tasks = {
        task: {
            metric: {"start": round(100 * statistics.fmean(values), 2), **table(rows, settings, task, metric)}
            for metric, values in metrics_of(start, task).items()
        }
        for task in start["tasks"]
    }
    seconds = [row["seconds"] for arm in settings["arms"] for row in rows.get(arm, {}).values()]
    return {
        "schema": 1,
        "table": name,
        "rows": settings["rows"],
        "problems": len(start["tasks"][next(iter(tasks))]["correct"].split()),
        "seconds_a_run": {"median": statistics.median(seconds), "most": max(seconds)},
        "tasks": tasks,
    }


def inside_measures(reading: dict[str, Any]) -> dict[str, float]:
    """The quantities of Figure 5 in one measurement: of the chosen layer l, and of the full policy."""
    at, layers = reading["layer"] - 1, reading["layers"]
    top = reading["cosine_of_layer"]["mean"][max(at + 1, layers - max(1, layers // 4)) :]
    return {
        "cosine to the top quarter": statistics.fmean(top),
        "entropy of layer l": reading["entropy"]["mean"][at],
        "perplexity": reading["perplexity"]["value"],
        "KL to layer l + 1": reading["divergence"]["mean"][0],
        "KL to the output": reading["divergence"]["mean"][-1],
    }


def inside(name: str = "inside") -> dict[str, Any] | None:
    """First and last measurements inside the model per arm, and their change: means over seeds, Student's interval."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return None
    arms = {}
    for arm, by_seed in read_rows(path).items():
        pairs = {s: (inside_measures(r["inside"][0]), inside_measures(r["inside"][-1])) for s, r in by_seed.items()}
        measures = {}
        for key in next(iter(pairs.values()))[0]:
            before, after = [a[key] for a, _ in pairs.values()], [b[key] for _, b in pairs.values()]
            change = [b - a for a, b in zip(before, after, strict=True)]
            measures[key] = {
                "before": round(statistics.fmean(before), 4),
                "after": round(statistics.fmean(after), 4),
                "change": round(statistics.fmean(change), 4),
                "each": {str(s): round(c, 4) for s, c in zip(pairs, change, strict=True)},
                **student(change),
            }
        first = next(iter(by_seed.values()))["inside"][0]
        arms[arm] = {"layer": first["layer"], "seeds": sorted(by_seed), "measures": measures}
    return {"schema": 1, "table": name, "rows": path.name, "arms": arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *TABLES], default=[])
    args = parser.parse_args()
    if not args.names and (changes := inside()) is not None:
        write_json(RESULTS / "inside.json", changes)
    for name in args.names or TABLES:
        result = make(name)
        if result is not None:
            write_json(RESULTS / f"{name}.json", result)
            print_table(name, result)


def print_table(name: str, result: dict[str, Any]) -> None:
    for task, metrics in result["tasks"].items():
        for metric, values in metrics.items():
            print(f"{name}, {task}, {metric}: start {values['start']} %")
            for arm, row in values["arms"].items():
                away = values.get("minus_baseline", {}).get(arm)
                far = "" if away is None else f"{away['mean']:+.2f} {away.get('ci95', '')}"
                print(f"  {arm:12} {row['mean']:6.2f} {row.get('ci95', '')} {far}")


if __name__ == "__main__":
    main()
