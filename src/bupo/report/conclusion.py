"""States in plain words what evaluations show, and nothing stronger than their intervals. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from bupo.evaluate.metrics import compare
from bupo.report.results import Evaluation
from bupo.report.style import role

SIGNIFICANCE = 0.05
Named = Sequence[tuple[str, Evaluation]]
Difference = Mapping[str, Any]  # second minus first: first, second, task, difference, ci95, p_value, problems (shares)


@dataclass(frozen=True)
class Conclusion:
    """``headline`` and ``lines`` are sentences; ``tone`` is ``better``, ``worse``, ``open`` or ``none``."""

    headline: str
    tone: str = "none"
    lines: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()


def outcome(difference: Difference) -> str:
    """Whether the second model is ``better`` or ``worse`` than the first, or ``open`` if neither is shown.

    A direction needs the whole 95 % interval on one side of zero and, where a p-value is known, p < 0.05.
    """
    low, high = difference["ci95"]
    p = difference.get("p_value")
    if p is not None and not p < SIGNIFICANCE:
        return "open"
    return "better" if low > 0 else "worse" if high < 0 else "open"


def compare_evaluations(evaluations: Named) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare evaluations on the tasks they share, problem by problem.

    Up to five evaluations are compared in all pairs. Of more, each is compared with the first one, and every BuPO
    model with its GRPO baseline.

    Returns:
        the differences, and one note per pair whose problems differ.
    """
    differences, notes = [], []
    for (first, one), (second, two) in _pairs(evaluations):
        for task in one.tasks:
            a, b = (e.tasks[task].shares if task in e.tasks else {} for e in (one, two))
            if a and b and a.keys() != b.keys():
                notes.append(f"{task}: {first} and {second} were evaluated on different problems, so they are not "
                             "compared.")  # fmt: skip
            elif a and b:
                result = compare(list(a.values()), [b[problem] for problem in a])
                differences.append({"first": first, "second": second, "task": task, **result})
    return differences, notes


def _pairs(evaluations: Named) -> list[tuple[tuple[str, Evaluation], tuple[str, Evaluation]]]:
    pairs = list(combinations(evaluations, 2))
    if len(evaluations) <= 5:
        return pairs
    names = {name.lower() for name, _ in evaluations}

    def is_baseline(one: str, other: str) -> bool:
        first, second = sorted((one.lower(), other.lower()), key=lambda name: role(name) == "bupo")
        namesake = second.replace("bupo", "grpo")
        return (role(first), role(second)) == ("grpo", "bupo") and (first == namesake or namesake not in names)

    return [pair for pair in pairs if pair[0] is evaluations[0] or is_baseline(pair[0][0], pair[1][0])]


def conclude(evaluations: Named, differences: Sequence[Difference]) -> Conclusion:
    """Say what was measured and which differences are shown.

    The headline is about BuPO against GRPO where both are among the evaluations, else about every model against the
    first one.
    """
    if not evaluations:
        return Conclusion("Nothing was evaluated; measure the models with `bupo eval` to see whether training helped.")
    lines = [_accuracy(name, task, score) for name, e in evaluations for task, score in e.tasks.items()]
    lines += [f"{d['task']}: {_sentence(d)}." for d in differences]
    main = [_bupo_second(d) for d in differences if {role(d["first"]), role(d["second"])} == {"grpo", "bupo"}]
    caveats = [
        "Intervals are 95 % bootstrap intervals over problems; differences are paired, problem by problem. A "
        "difference counts as shown if its interval excludes zero and the paired test gives p < 0.05."
    ]
    if differences:
        caveats.append(
            "They say how certain the difference between these trained models is, not how another training seed would "
            "have come out."
        )
    if len(differences) > 1:
        caveats.append("The p-values of the several comparisons are not corrected for their number.")
    if main:
        headline, tone = _headline(main, {"grpo": "GRPO", "bupo": "BuPO"})
    elif {"grpo", "bupo"} <= {role(name) for name, _ in evaluations}:
        headline, tone = "BuPO and GRPO were not evaluated on the same problems, so neither is called better.", "none"
    elif against_first := [d for d in differences if d["first"] == evaluations[0][0]]:
        headline, tone = _headline(against_first, {})
    else:
        count = len(evaluations)
        headline, tone = (
            f"{count} evaluation{'s' * (count > 1)}, with nothing to compare; the results are below.",
            "none",
        )
    return Conclusion(headline, tone, tuple(lines), tuple(caveats))


def _accuracy(name: str, task: str, score: Any) -> str:
    if score.avg_at_k is None:
        return f"{task}: {name} has no score ({score.reason})."
    low, high = score.avg_at_k.ci95
    return (
        f"{task}: {name} reaches Avg@{score.avg_at_k.k} {100 * score.avg_at_k.mean:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}] on {score.n_problems if score.n_problems is not None else '?'} problems."
    )


def _sentence(d: Difference) -> str:
    numbers = f"({d['second']} minus {d['first']}: {_numbers(d)})"
    if outcome(d) == "open":
        return f"no difference between {d['second']} and {d['first']} is shown {numbers}"
    return f"{d['second']} is {outcome(d)} than {d['first']} {numbers}"


def _headline(main: Sequence[Difference], titles: Mapping[str, str]) -> tuple[str, str]:
    """One sentence and its tone; ``titles`` replaces the models' names by those of their roles."""
    first, second = (titles.get(role(main[0][side]) or "", main[0][side]) for side in ("first", "second"))
    outcomes = [outcome(d) for d in main]
    tone = outcomes[0] if len(set(outcomes)) == 1 else "open"
    if len(main) == 1:
        words = {"better": f"is better than {first} on {main[0]['task']}",
                 "worse": f"is not better than {first} on {main[0]['task']}; it is worse",
                 "open": f"is not shown to be better than {first} on {main[0]['task']}"}  # fmt: skip
        return f"{second} {words[tone]}: {_numbers(main[0])}.", tone
    several = len({d["second"] for d in main}) > 1 and not titles
    subjects = [f"{d['second']}, {d['task']}" if several else d["task"] for d in main]
    parts = []
    for kind, how in (("better", "better"), ("worse", "worse"), ("open", "no difference shown")):
        if group := [subject for subject, found in zip(subjects, outcomes, strict=True) if found == kind]:
            parts.append(f"{how} on {len(group)} of {len(main)} ({'; '.join(group)})")
    subject = f"Compared with {first}" if several else f"{second} against {first}"
    if not several and "better" not in outcomes:
        subject = f"{second} is not shown to be better than {first} on any comparison"
    return f"{subject}: {'; '.join(parts)}.", tone


def _bupo_second(d: Difference) -> Difference:
    """The same difference as BuPO minus GRPO."""
    if role(d["second"]) == "bupo":
        return d
    low, high = d["ci95"]
    turned = {"difference": -d["difference"], "ci95": [-high, -low]}
    return {**d, "first": d["second"], "second": d["first"], **turned}


def _numbers(d: Difference) -> str:
    low, high = d["ci95"]
    text = f"{100 * d['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    if (p := d.get("p_value")) is not None:
        text += f", p = {p:.3f}" if p >= 0.001 else ", p < 0.001"
    return text.replace("-", "−")
