"""Tables from the lines of `experiments/grid.py`: means over seeds, and differences paired by seed with 95 % intervals.

Command: ``python experiments/summary.py guard`` (or another name of `TABLES`), written to ``experiments/results/``

A difference is taken seed by seed (the same prompts, order and held-out problems in both arms); its interval is
Student's over seeds, so that it speaks of other seeds, not of other problems. Intervals of few seeds are wide: that is
what few seeds are worth. The best fixed schedule is chosen by its mean over the same seeds, which favours it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bupo.rundir import write_json

RESULTS = Path(__file__).resolve().parent / "results"
# Student's 97.5 % quantile by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
TABLES: dict[str, dict[str, Any]] = {
    "guard": {
        "fixed": ["grpo", "steps4", "bupo", "steps16", "steps30", "steps45"],
        "others": ["auto45"],
        "seeds": [0, 1, 2],
    },
}


def read(path: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by arm and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and Student's 95 % interval, in points of percent."""
    mean = statistics.fmean(values)
    found: dict[str, Any] = {"mean": round(100 * mean, 2), "seeds": len(values)}
    if len(values) > 1:
        half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
        found["ci95"] = [round(100 * (mean - half), 2), round(100 * (mean + half), 2)]
    return found


def difference(one: dict[int, dict], other: dict[int, dict], task: str, seeds: list[int]) -> dict[str, Any]:
    """``one`` minus ``other``, paired by seed, in points."""
    both = [seed for seed in seeds if seed in one and seed in other]
    values = [one[s]["tasks"][task]["avg"] - other[s]["tasks"][task]["avg"] for s in both]
    return {**interval(values), "each": {str(s): round(100 * v, 2) for s, v in zip(both, values, strict=True)}}


def table(rows: dict[str, dict[int, dict]], wanted: dict[str, Any], task: str) -> dict[str, Any]:
    """Means of all arms, the best fixed one, and the others' differences from it."""
    seeds = wanted["seeds"]
    arms = {}
    for name in [*wanted["fixed"], *wanted["others"]]:
        have = [seed for seed in seeds if seed in rows.get(name, {})]
        if not have:
            continue
        arms[name] = {
            "changes": rows[name][have[0]]["changes"],
            **interval([rows[name][seed]["tasks"][task]["avg"] for seed in have]),
            "each": {str(s): round(100 * rows[name][s]["tasks"][task]["avg"], 2) for s in have},
            "phase_end": {str(s): rows[name][s].get("phase_end") for s in have if rows[name][s].get("phase_end")},
        }
    whole = {name: arm for name, arm in arms.items() if arm["seeds"] == len(seeds) and name in wanted["fixed"]}
    best = max(whole, key=lambda name: whole[name]["mean"]) if whole else None
    found: dict[str, Any] = {"task": task, "arms": arms, "best_fixed": best}
    if best is not None:
        found["minus_best_fixed"] = {
            name: difference(rows[name], rows[best], task, seeds) for name in arms if name != best
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(TABLES))
    parser.add_argument("--rows", type=Path, default=RESULTS / "small.jsonl")
    args = parser.parse_args()
    rows = read(args.rows)
    result = {
        "schema": 1,
        "table": args.name,
        "rows": args.rows.name,
        "start": {name: round(100 * task["avg"], 2) for name, task in rows["start"][0]["tasks"].items()},
        "tasks": {task: table(rows, TABLES[args.name], task) for task in rows["start"][0]["tasks"]},
    }
    write_json(RESULTS / f"{args.name}.json", result)
    for task, found in result["tasks"].items():
        print(f"{task}: start {result['start'][task]} %")
        for name, arm in found["arms"].items():
            away = found.get("minus_best_fixed", {}).get(name)
            print(
                f"  {name:8} {arm['mean']:6.2f} {arm['each']}",
                "" if away is None else f"{away['mean']:+.2f} {away['each']}",
            )


if __name__ == "__main__":
    main()
