"""What the evaluations show, in plain words and no stronger than their intervals. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from bupo.report.style import role

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Verdict:
    """``headline`` and ``lines`` are sentences; ``tone`` is ``better``, ``worse``, ``open`` or ``none``."""

    headline: str
    tone: str
    lines: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()


def outcome(comparison: Mapping[str, Any]) -> str:
    """``better``, ``worse`` or ``open``: the second model against the first.

    A direction needs the whole 95 % interval on one side of zero and, where a p-value is given, p < 0.05.
    """
    low, high = comparison["ci95"]
    p = comparison.get("p_value")
    if p is not None and not p < SIGNIFICANCE:
        return "open"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "open"


def verdict(evaluations: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> Verdict:
    """Say what was measured and which differences are shown.

    Args:
        evaluations: ``{"name", "results"}``, results as in ``results.json``.
        comparisons: paired, second minus first: ``{"first", "second", "task", "difference", "ci95", "p_value",
            "problems"}``; shares, not percent.
    """
    lines = [line for item in evaluations for line in _accuracies(item)]
    lines += [comparison_sentence(c) for c in comparisons]
    if not lines:
        return Verdict("Nothing was evaluated, so there is no result to judge.", "none")
    caveats = ["Intervals are 95 % bootstrap intervals over problems; differences are paired, problem by problem."]
    main = [c for c in comparisons if (role(c["first"]), role(c["second"])) in (("grpo", "bupo"), ("bupo", "grpo"))]
    main = [c if role(c["second"]) == "bupo" else _swapped(c) for c in main]
    if main:
        caveats.append(
            "They say how sure the difference between these two trained models is, not how another training seed "
            "would have come out."
        )
    if len(comparisons) > 1:
        caveats.append("Several comparisons are shown; their p-values are not corrected for that.")
    headline, tone = _headline(main, evaluations)
    return Verdict(headline, tone, tuple(lines), tuple(caveats))


def comparison_sentence(comparison: Mapping[str, Any]) -> str:
    """One sentence on a paired comparison."""
    first, second, task = comparison["first"], comparison["second"], comparison.get("task", "")
    found, numbers = outcome(comparison), _numbers(comparison)
    on = f"{task}: " if task else ""
    if found == "open":
        return f"{on}no difference between {second} and {first} is shown ({second} minus {first}: {numbers})."
    return f"{on}{second} is {found} than {first} ({second} minus {first}: {numbers})."


def paired_comparisons(evaluations: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare every two evaluations (from the sixth on, only with the first) on the tasks both have.

    Returns:
        comparisons as `verdict` takes them, and a note for each pair that cannot be compared because its problems
        differ.
    """
    from bupo.evaluate.metrics import compare

    found, notes = [], []
    pairs = (
        list(combinations(evaluations, 2)) if len(evaluations) <= 5 else [(evaluations[0], e) for e in evaluations[1:]]
    )
    for first, second in pairs:
        tasks = first["results"].get("tasks", {})
        for task in tasks:
            one, two = (_shares(item["results"].get("tasks", {}).get(task, {})) for item in (first, second))
            if not one or not two:
                continue
            if one.keys() != two.keys():
                notes.append(f"{task}: {first['name']} and {second['name']} were evaluated on different problems; "
                             "they are not compared.")  # fmt: skip
                continue
            result = compare([one[i] for i in one], [two[i] for i in one])
            found.append({"first": first["name"], "second": second["name"], "task": task, **result.to_json()})
    return found, notes


def _shares(task: Mapping[str, Any]) -> dict[str, float]:
    n = task.get("n_samples")
    return {p["id"]: p["correct"] / n for p in task.get("problems", [])} if n else {}


def _accuracies(item: Mapping[str, Any]) -> list[str]:
    lines = []
    for task, result in item["results"].get("tasks", {}).items():
        average = result.get("avg_at_k")
        if average:
            low, high = average["ci95"]
            lines.append(
                f"{task}: {item['name']} reaches Avg@{average['k']} {100 * average['mean']:.1f} % "
                f"[{100 * low:.1f}, {100 * high:.1f}] on {result.get('n_problems', '?')} problems."
            )
        else:
            lines.append(f"{task}: {item['name']} has no score ({result.get('reason', 'no reason recorded')}).")
    return lines


def _headline(main: list[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    if not main:
        roles = {role(item["name"]) for item in evaluations}
        if {"grpo", "bupo"} <= roles:
            return "BuPO and GRPO were not compared on the same problems, so neither is called better.", "none"
        return (
            f"{len(evaluations)} evaluation{'s' * (len(evaluations) != 1)}; BuPO and GRPO are not both among them.",
            "none",
        )
    found = {kind: [c for c in main if outcome(c) == kind] for kind in ("better", "worse", "open")}
    if len(main) == 1:
        one, task = main[0], main[0].get("task") or "the evaluated problems"
        kind = outcome(one)
        if kind == "better":
            return f"BuPO is better than GRPO on {task}: {_numbers(one)}.", kind
        if kind == "worse":
            return f"BuPO is not better than GRPO on {task}; it is worse: {_numbers(one)}.", kind
        return f"BuPO is not shown to be better than GRPO on {task}: {_numbers(one)}.", kind
    parts = [
        f"{words} on {len(group)} of {len(main)} ({', '.join(str(c.get('task', '')) for c in group)})"
        for kind, words in (("better", "better"), ("worse", "worse"), ("open", "no difference shown"))
        if (group := found[kind])
    ]
    tone = "better" if found["better"] and not found["worse"] and not found["open"] else "open"
    tone = "worse" if found["worse"] and not found["better"] else tone
    start = "BuPO against GRPO" if found["better"] else "BuPO is not shown to be better than GRPO on any comparison"
    return f"{start}: {'; '.join(parts)}.", tone


def _swapped(comparison: Mapping[str, Any]) -> dict[str, Any]:
    low, high = comparison["ci95"]
    return {
        **comparison,
        "first": comparison["second"],
        "second": comparison["first"],
        "difference": -comparison["difference"],
        "ci95": [-high, -low],
    }


def _numbers(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["ci95"]
    text = f"{100 * comparison['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    if comparison.get("p_value") is not None:
        p = comparison["p_value"]
        text += f", p = {p:.3f}" if p >= 0.001 else ", p < 0.001"
    return text.replace("-", "−")
