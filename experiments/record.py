"""Analyses the runs of record by docs/protocol.md: families of paired differences, Holm's correction, verdicts.

Run ``python -m experiments.record`` after ``bupo sweep experiments/grids/record.yaml``. It reads, in
``experiments/results``, ``record-tuning.jsonl`` and ``record.jsonl``, and of the grids ``smollm2-record.yaml`` and
``qwen.yaml`` the rows ``smollm2-record.jsonl`` and ``qwen-record.jsonl``; it writes ``record.json``. Differences are
in points. `markdown` renders its tables for docs/evidence.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bupo.report.evaluations import outcome
from bupo.run_folder import write_json
from bupo.sweep.rows import Row, Rows, read_rows, rounded
from bupo.sweep.statistics import describe, holm, paired, paired_p, scores, student
from experiments.summary import RESULTS, ratio

MAIN = ["raw4x8", "ridge4x8", "ridge4x16", "ridge6x45"]
FAMILIES = {
    "end": [(arm, "grpo") for arm in MAIN],
    "controls": [
        ("grpo37", "raw4x8"), ("grpo37", "ridge4x8"), ("grpo29", "ridge4x16"), ("raw8x8", "raw4x8"),
        ("random-raw4x8", "raw4x8"), ("random-ridge4x8", "ridge4x8"), ("frozen1-4", "grpo"), ("middle-third", "grpo"),
        ("ridge6x8", "grpo"),
    ],
    "described": [("raw4x8-3e-5", "grpo"), ("ridge6x16", "grpo"), *((f"only{layer}", "grpo") for layer in range(1, 9))],
}  # fmt: skip
RATES, NEAR, NEVER = ("1.5e-5", "3e-5", "6e-5"), 0.5, 46  # points within which 3e-5 wins; batches
NAMES = {
    "grpo": "GRPO", "raw4x8": "raw, layer 4, 8 batches", "ridge4x8": "ridge, layer 4, 8 batches",
    "ridge4x16": "ridge, layer 4, 16 batches", "ridge6x45": "ridge, layer 6, all 45", "grpo37": "GRPO, 37 batches",
    "grpo29": "GRPO, 29 batches", "raw8x8": "raw, layer 8, 8 batches",
    "random-raw4x8": "raw, layer 4, 8 paid at random",
    "random-ridge4x8": "ridge, layer 4, 8 paid at random", "frozen1-4": "GRPO, layers 1-4 frozen",
    "middle-third": "GRPO on the middle third", "ridge6x8": "ridge, layer 6, 8 batches",
    **{f"{lens}{layer}x2": f"{lens}, layer {layer}, 2 batches" for lens in ("raw", "ridge") for layer in (12, 15)},
    "ridge6x16": "ridge, layer 6, 16 batches", "raw4x8-3e-5": "raw, layer 4, 8 batches, GRPO's rate",
    **{f"only{layer}": f"GRPO on layer {layer} alone" for layer in range(1, 9)},
}  # fmt: skip


@dataclass(frozen=True)
class Instrument:
    """How a model's runs are read: tasks and metrics (the secondary ones by name), margin in points, samples."""

    primary: tuple[str, str]
    secondary: dict[str, tuple[str, str]]
    margin: float
    samples: int


_HARD = {
    "harder": ("arithmetic-hard", "avg"),
    "Pass@8": ("arithmetic", "pass"),
    "harder, Pass@8": ("arithmetic-hard", "pass"),
}
SMALL = Instrument(("arithmetic", "avg"), _HARD, 1.0, 8)
SUMS = {
    "smollm2": Instrument(("held-out", "avg"), {"shifted": ("shifted", "avg")}, 2.0, 4),
    "qwen": Instrument(("held-out", "avg"), {"shifted": ("shifted", "avg")}, 3.0, 4),
}
ON_SUMS = {"smollm2": ["raw15x2", "ridge15x2"], "qwen": ["raw12x2", "ridge12x2"]}


def verdict(
    ends: Sequence[float] | None, p: float | None, margin: float, words: tuple[str, str] = ("higher", "lower")
) -> str:
    """The protocol's words for an interval and a corrected p-value; ``margin`` and interval in the same units."""
    if ends is None:
        return "one seed"
    if (found := outcome(ends, p)) != "open":
        return words[found == "worse"]
    if -margin <= ends[0] and ends[1] <= margin:
        return f"no difference larger than {margin:g}"
    return "not shown either way"


def difference(one: dict[int, Row], other: dict[int, Row], task: str, metric: str, seeds: list[int]) -> dict[str, Any]:
    """``one`` minus ``other`` over their common seeds, in points."""
    away = 100 * paired(one, other, task, seeds, metric)
    each = away.mean(axis=1)
    return {**rounded(describe(away)), "seeds": len(seeds), "each": rounded(each.tolist()), "p": paired_p(each)}


def family(
    rows: Rows, pairs: Sequence[tuple[str, str]], read: Instrument, *, tested: bool = True
) -> list[dict[str, Any]]:
    """The pairs that have run with common seeds, with Holm's correction over them, and verdicts."""
    found = []
    for arm, base in pairs:
        one, other = rows.get(arm, {}), rows.get(base, {})
        if not (seeds := sorted(one.keys() & other.keys())):
            continue
        more = {name: difference(one, other, *measure, seeds) for name, measure in read.secondary.items()}
        row = {"arm": arm, "other": base, "primary": difference(one, other, *read.primary, seeds), "secondary": more}
        found.append(
            {**row, "update_time": ratio([one[s]["update_seconds"] / other[s]["update_seconds"] for s in seeds])}
        )
    if tested:
        correct({f"{row['arm']} {row['other']}": row["primary"] for row in found}, len(pairs), "ci_both", read.margin)
    return found


def correct(differences: Mapping[str, dict[str, Any]], size: int, interval: str, *how: Any) -> None:
    """Add ``p_holm`` and ``verdict`` (with ``how``: margin and words) to the members of a family of so many.

    Those that have not run count with a p-value of 1, so that what is shown before them stays shown.
    """
    absent = {f"not run {number}": 1.0 for number in range(len(differences), size)}
    adjusted = holm({**{name: away["p"] for name, away in differences.items()}, **absent})
    for name, away in differences.items():
        away |= {"p_holm": adjusted[name], "verdict": verdict(away[interval], adjusted[name], *how)}


def rate_of(rows: Rows, arm: str) -> tuple[str, dict[str, float]]:
    """The learning rate that tuning gives an arm, and the mean of each rate in per cent."""
    means = {rate: 100 * float(scores(own, "arithmetic", sorted(own)).mean()) for rate in RATES
             if (own := rows.get(f"{arm}-{rate}"))}  # fmt: skip
    best = max(means, key=lambda rate: means[rate])
    near = means[best] - means.get("3e-5", -NEAR) <= NEAR
    return "3e-5" if near else best, {rate: round(mean, 2) for rate, mean in means.items()}


def half_of_gain(tuning: Mapping[int, Row]) -> float:
    """The reward half way between the first batch's and the last five batches' of GRPO with the tuning seeds."""
    curves = [row["curves"]["reward"] for row in tuning.values()]
    start, end = statistics.fmean(c[0] for c in curves), statistics.fmean(statistics.fmean(c[-5:]) for c in curves)
    return start + (end - start) / 2


def batch_of(reward: Sequence[float], level: float) -> int:
    """The first batch (from 1) whose mean with the four before it reaches a reward, else `NEVER`."""
    means = np.convolve(reward, np.ones(5) / 5, mode="valid")
    return int(np.argmax(means >= level)) + 5 if (means >= level).any() else NEVER


def speed(rows: Rows, level: float) -> list[dict[str, Any]]:
    """Batches to the level for the main arms, minus GRPO's, and the ratio of the update seconds up to there."""
    reached = {
        arm: {s: batch_of(row["curves"]["reward"], level) for s, row in rows[arm].items()}
        for arm in ["grpo", *MAIN] if arm in rows
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for arm, batches in reached.items():
        one: dict[str, Any] = {
            "arm": arm,
            "batches": round(statistics.fmean(batches.values()), 2),
            "seeds": len(batches),
        }
        one["never"] = sum(batch == NEVER for batch in batches.values())
        common = sorted(batches.keys() & reached["grpo"].keys())
        if arm != "grpo" and common:
            away = [batches[seed] - reached["grpo"][seed] for seed in common]
            one |= {"mean": round(statistics.fmean(away), 2), "ci_seeds": rounded(student(away)), "p": paired_p(away)}
            seconds = [[_seconds(rows[a][s], reached[a][s]) for a in (arm, "grpo")] for s in common]
            one["update_time"] = ratio([own / base for own, base in seconds])
        found.append(one)
    correct({one["arm"]: one for one in found if "p" in one}, len(MAIN), "ci_seeds", 2.0, ("later", "sooner"))
    return found


def _seconds(row: Row, batch: int) -> float:
    seconds = row["curves"]["update_seconds"]
    return seconds[min(batch, len(seconds)) - 1]


def make() -> dict[str, Any] | None:
    """All of the analysis, or None before there are runs."""
    tuning, path = read_rows(RESULTS / "record-tuning.jsonl"), RESULTS / "record.jsonl"
    if not path.exists():
        return None
    rows = read_rows(path)
    rates = {arm: rate_of(tuning, arm) for arm in ("grpo", *MAIN)}
    level = half_of_gain(tuning[f"grpo-{rates['grpo'][0]}"])
    families = {name: family(rows, pairs, SMALL, tested=name != "described") for name, pairs in FAMILIES.items()}
    return {
        "schema": 1,
        "tuning": {arm: {"chosen": chosen, "means": means} for arm, (chosen, means) in rates.items()},
        **described(rows, SMALL),
        "families": families,
        "speed": {"reward": round(level, 4), "arms": speed(rows, level)},
        "sums": {name: on_sums(name) for name in SUMS if rows_of(name).exists()},
    }


def rows_of(name: str) -> Path:
    return RESULTS / f"{name}-record.jsonl"


def on_sums(name: str) -> dict[str, Any]:
    """The one family of the runs with SmolLM2 or Qwen: its arms against GRPO."""
    rows = read_rows(rows_of(name))
    pairs = [(arm, "grpo") for arm in ON_SUMS[name]]
    return {**described(rows, SUMS[name]), "families": {"end": family(rows, pairs, SUMS[name])}}


def described(rows: Rows, read: Instrument) -> dict[str, Any]:
    """Seeds, mean and intervals of every arm, and what a run takes."""
    arms = {
        arm: {"seeds": sorted(own), **rounded(describe(100 * scores(own, read.primary[0], sorted(own))))}
        for arm, own in rows.items()
    }
    seconds = [row["seconds"] for own in rows.values() for row in own.values()]
    return {"arms": arms, "runs": {"n": len(seconds), "median_seconds": round(statistics.median(seconds))}}


def markdown(found: Mapping[str, Any], what: str) -> str:
    """One table: ``tuning``, ``speed``, a family, ``smollm2`` or ``qwen``; `FileNotFoundError` before its runs."""
    if what == "tuning":
        rows = [f"| arm | {' | '.join(RATES)} | taken |", "| --- |" + " --- |" * (len(RATES) + 1)]
        for arm, one in found["tuning"].items():
            cells = [f"{one['means'][rate]:.1f}" if rate in one["means"] else "" for rate in RATES]
            rows.append(f"| {NAMES[arm]} | {' | '.join(cells)} | {one['chosen']} |")
        return "\n".join(rows)
    if what == "speed":
        rows = ["| arm | batches to half of the gain | never | minus GRPO [95 % over seeds] | Holm p | verdict "
                "| seconds of updates / GRPO's |", "| --- |" + " --- |" * 6]  # fmt: skip
        for one in found["speed"]["arms"]:
            away = " | | | " if "p" not in one else f" {_away(one, 'ci_seeds')} | {_tested(one)} | {_time(one)}"
            rows.append(f"| {NAMES[one['arm']]} | {one['batches']:.1f} | {one['never']} of {one['seeds']} |{away} |")
        return "\n".join(rows)
    read, found, what = (SUMS[what], found["sums"].get(what), "end") if what in SUMS else (SMALL, found, what)
    if found is None or not found["families"][what]:
        raise FileNotFoundError(f"no pair of the family {what} has run")
    tested, more = what != "described", "".join(f" {name}, points |" for name in [*read.secondary][:2])
    rows = [f"| arm | Avg@{read.samples}, % | minus | seeds | points [95 % over seeds and problems] |"]
    rows[0] += f"{tested * ' Holm p | verdict |'}{more} time of updates |"
    rows.append("| --- |" + " --- |" * (rows[0].count("|") - 2))
    if what == "end":
        base = found["arms"]["grpo"]
        rows.append(f"| GRPO | {base['mean']:.1f} | | {len(base['seeds'])} |" + " |" * (rows[0].count("|") - 5))
    for one in found["families"][what]:
        away, others = one["primary"], one["secondary"]
        cells = [NAMES[one["arm"]], f"{found['arms'][one['arm']]['mean']:.1f}", NAMES[one["other"]], str(away["seeds"])]
        cells += [_away(away, "ci_both"), *([_tested(away)] if tested else [])]
        cells += [_away(other, "ci_both") for other in [*others.values()][:2]] + [_time(one)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _away(one: Mapping[str, Any], interval: str) -> str:
    ends = one[interval]
    return f"{one['mean']:+.1f} " + (f"[{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else "[one seed]")


def _tested(one: Mapping[str, Any]) -> str:
    p = one["p_holm"]
    return f"{'' if p is None else '< 0.001' if p < 0.001 else f'{p:.3f}'} | {one['verdict']}"


def _time(one: Mapping[str, Any]) -> str:
    time = one["update_time"]
    return f"{time['mean']:.2f}" + (f" [{time['ci95'][0]:.2f}, {time['ci95'][1]:.2f}]" if time["ci95"] else "")


if __name__ == "__main__":
    if (result := make()) is not None:
        write_json(RESULTS / "record.json", result)
        for name in ("tuning", *FAMILIES, "speed", *SUMS):
            with suppress(FileNotFoundError):
                print(f"{name}\n{markdown(result, name)}\n")
