"""Tables from the lines of `experiments/grid.py`: means over seeds, and differences paired by seed with 95 % intervals.

Command: ``python -m experiments.summary`` (all tables whose lines are there; or names of `TABLES`), written to
``experiments/results/NAME.json``

A difference is taken seed by seed (the same prompts, order and held-out problems in both arms); its interval is
Student's over seeds, so that it speaks of other seeds, not of other problems. Intervals of few seeds are wide: that is
what few seeds are worth. Beside it stands the interval over problems (bootstrap of each problem's mean over the seeds
that both arms have), which speaks of other problems of these seeds. Neither alone covers both. In the table ``guard``
the baseline is the best fixed schedule by its mean over the same seeds, which favours it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bupo.evaluate.metrics import bootstrap, pass_at_k
from bupo.run_folder import write_json

RESULTS = Path(__file__).resolve().parent / "results"
# Student's 97.5 % quantile by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
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
    "rates": {"rows": SMALL, "arms": ["bupo", "frozen4", "upper0.1", "grpo"], "seeds": 3},
}
Rows = dict[str, dict[int, dict[str, Any]]]


def read(path: Path) -> Rows:
    """Rows by arm and seed."""
    found: Rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def values(row: dict[str, Any], task: str) -> dict[str, list[float]]:
    """Of every problem: the share of right samples (Avg@K), and whether one of all of them is right (Pass@K)."""
    samples = row["tasks"][task]["samples"]
    correct = [int(c) for c in row["tasks"][task]["correct"].split()]
    return {
        f"avg@{samples}": [c / samples for c in correct],
        f"pass@{samples}": [pass_at_k(samples, c, samples) for c in correct],
    }


def interval(found: list[float]) -> dict[str, Any]:
    """Mean and Student's 95 % interval, in points of percent."""
    mean = statistics.fmean(found)
    result: dict[str, Any] = {"mean": round(100 * mean, 2), "seeds": len(found)}
    if len(found) > 1:
        half = STUDENT[len(found) - 1] * statistics.stdev(found) / len(found) ** 0.5
        result["ci95"] = [round(100 * (mean - half), 2), round(100 * (mean + half), 2)]
    return result


def difference(
    one: dict[int, dict], other: dict[int, dict], task: str, metric: str, seeds: list[int]
) -> dict[str, Any]:
    """``one`` minus ``other`` in points: paired by seed, and by problem."""
    both = [seed for seed in seeds if seed in one and seed in other]
    pairs = [(values(one[s], task)[metric], values(other[s], task)[metric]) for s in both]
    each = [statistics.fmean(a) - statistics.fmean(b) for a, b in pairs]
    by_problem = [statistics.fmean(a[i] - b[i] for a, b in pairs) for i in range(len(pairs[0][0]))]
    over = bootstrap(by_problem)
    return {
        **interval(each),
        "ci95_problems": [round(100 * over.low, 2), round(100 * over.high, 2)],
        "each": {str(s): round(100 * v, 2) for s, v in zip(both, each, strict=True)},
    }


def table(rows: Rows, wanted: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    """Means of all arms that are there, and differences from a baseline: the first, the best of some, each its own."""
    seeds = list(range(wanted["seeds"]))
    arms = {}
    for name in wanted["arms"]:
        have = [seed for seed in seeds if seed in rows.get(name, {})]
        if not have:
            continue
        means = {seed: statistics.fmean(values(rows[name][seed], task)[metric]) for seed in have}
        arms[name] = {
            "changes": rows[name][have[0]]["changes"],
            **interval(list(means.values())),
            "each": {str(s): round(100 * v, 2) for s, v in means.items()},
            "mean_length": round(statistics.fmean(rows[name][s]["tasks"][task]["mean_length"] for s in have), 2),
        }
        ended = {str(s): rows[name][s]["phase_end"] for s in have if rows[name][s].get("phase_end")}
        if ended:
            arms[name]["phase_end"] = ended
    whole = [name for name, arm in arms.items() if arm["seeds"] == len(seeds)]
    choices = [name for name in wanted.get("best_of", wanted["arms"][:1]) if name in whole]
    baseline = max(choices, key=lambda name: arms[name]["mean"], default=None)
    against = wanted.get("against") or ({} if baseline is None else dict.fromkeys(arms, baseline))
    pairs = {one: other for one, other in against.items() if one != other and one in arms and other in arms}
    found: dict[str, Any] = {"arms": arms, "baseline": wanted.get("against", baseline)}
    if pairs:
        found["minus_baseline"] = {
            one: difference(rows[one], rows[other], task, metric, seeds) for one, other in pairs.items()
        }
    return found


def make(name: str) -> dict[str, Any] | None:
    """A table's content, or None where its lines are not there."""
    wanted = TABLES[name]
    path = RESULTS / wanted["rows"]
    rows = read(path) if path.exists() else {}
    if "start" not in rows or not any(arm in rows for arm in wanted["arms"]):
        return None
    start = rows["start"][0]
    tasks = {}
    for task in start["tasks"]:
        metrics = values(start, task)
        tasks[task] = {
            metric: {"start": round(100 * statistics.fmean(found), 2), **table(rows, wanted, task, metric)}
            for metric, found in metrics.items()
        }
    seconds = [row["seconds"] for arm in wanted["arms"] for row in rows.get(arm, {}).values()]
    return {
        "schema": 1,
        "table": name,
        "rows": wanted["rows"],
        "problems": len(next(iter(values(start, next(iter(start["tasks"]))).values()))),
        "seconds_a_run": {"median": statistics.median(seconds), "most": max(seconds)},
        "tasks": tasks,
    }


# -- inside ------------------------------------------------------------------------------------------------------------


def inside_measures(reading: dict[str, Any]) -> dict[str, float]:
    """The four quantities of Figure 5 in one reading: of the chosen layer l, and of the full policy."""
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
    """First and last readings of every arm, and the last minus the first: mean over seeds, Student's interval."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return None
    arms = {}
    for arm, by_seed in read(path).items():
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
            }
            if len(change) > 1:
                half = STUDENT[len(change) - 1] * statistics.stdev(change) / len(change) ** 0.5
                mean = statistics.fmean(change)
                measures[key]["ci95"] = [round(mean - half, 4), round(mean + half, 4)]
        first = next(iter(by_seed.values()))["inside"][0]
        arms[arm] = {"layer": first["layer"], "seeds": sorted(by_seed), "measures": measures}
    return {"schema": 1, "table": name, "rows": path.name, "arms": arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *TABLES], default=[])
    args = parser.parse_args()
    if not args.names and (found := inside()) is not None:
        write_json(RESULTS / "inside.json", found)
    for name in args.names or TABLES:
        result = make(name)
        if result is None:
            continue
        write_json(RESULTS / f"{name}.json", result)
        for task, metrics in result["tasks"].items():
            for metric, found in metrics.items():
                print(f"{name}, {task}, {metric}: start {found['start']} %")
                for arm, row in found["arms"].items():
                    away = found.get("minus_baseline", {}).get(arm)
                    far = "" if away is None else f"{away['mean']:+.2f} {away.get('ci95', '')}"
                    print(f"  {arm:12} {row['mean']:6.2f} {row.get('ci95', '')} {far}")


if __name__ == "__main__":
    main()
