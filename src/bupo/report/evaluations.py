"""What evaluations show: in words that are no stronger than their intervals, in figures, and in tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bupo.evaluate.metrics import compare
from bupo.report.results import Estimate, Evaluation, TaskScore
from bupo.report.style import SOFT, grid, legend_below, looks, role, styled

Named = Sequence[tuple[str, Evaluation]]
Difference = Mapping[str, Any]  # second minus first: first, second, task, difference, ci95, p_value, problems (shares)


@dataclass(frozen=True)
class Conclusion:
    """``headline`` and ``lines`` are sentences; ``tone`` is ``better``, ``worse``, ``open`` or ``none``."""

    headline: str
    tone: str = "none"
    lines: Sequence[str] = ()


def outcome(ends: Sequence[float] | None, p: float | None) -> str:
    """``better`` or ``worse`` if the 95 % interval of a difference excludes zero and p < 0.05; else ``open``."""
    if ends is None or p is None or not p < 0.05:
        return "open"
    return "better" if ends[0] > 0 else "worse" if ends[1] < 0 else "open"


def compare_evaluations(evaluations: Named) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the paired differences on the tasks that evaluations share, and a note per pair whose problems differ.

    Of more than five, only those with the first one, and of every BuPO model with the GRPO baseline before it.
    """
    names = {name.lower() for name, _ in evaluations}
    differences, notes = [], []
    for (first, one), (second, two) in combinations(evaluations, 2):
        baseline = second.lower().replace("bupo", "grpo")
        is_baseline = _is_main(first, second) and (first.lower() == baseline or baseline not in names)
        if len(evaluations) > 5 and one is not evaluations[0][1] and not is_baseline:
            continue
        for task in one.tasks:
            a, b = (e.tasks[task].shares if task in e.tasks else {} for e in (one, two))
            if a and b and a.keys() != b.keys():
                pair = f"{first} and {second}"
                notes.append(f"{task}: {pair} were evaluated on different problems, so they are not compared.")
            elif a and b:
                result = compare(list(a.values()), [b[problem] for problem in a])
                differences.append({"first": first, "second": second, "task": task, **result})
    return differences, notes


def _is_main(first: str, second: str) -> bool:
    return (role(first), role(second)) == ("grpo", "bupo")


def conclude(evaluations: Named, differences: Sequence[Difference]) -> Conclusion:
    """Say what was measured and which differences are shown: of BuPO from GRPO, else of every model from the first."""
    if not evaluations:
        return Conclusion("Nothing was evaluated; measure the models with `bupo eval` to see whether training helped.")
    lines = [_accuracy(name, task, score) for name, e in evaluations for task, score in e.tasks.items()]
    for d in differences:
        first, second, found = d["first"], d["second"], outcome(d["ci95"], d["p_value"])
        none = f"no difference between {second} and {first} is shown"
        claim = none if found == "open" else f"{second} is {found} than {first}"
        if found == "open" and not d["ci95"][0] <= 0 <= d["ci95"][1]:
            claim += ", which takes p below 0.05 as well as an interval without zero"
        lines.append(f"{d['task']}: {claim} ({second} minus {first}: {_numbers(d)}).")
    count, tone = len(evaluations), "none"
    if main := [d for d in differences if _is_main(d["first"], d["second"])]:
        headline, tone = _headline(main, "GRPO", "BuPO")
    elif {"grpo", "bupo"} <= {role(name) for name, _ in evaluations}:
        headline = "BuPO and GRPO were not evaluated on the same problems, so neither is called better."
    elif main := [d for d in differences if d["first"] == evaluations[0][0]]:
        several = len({d["second"] for d in main}) > 1
        headline, tone = _headline(main, evaluations[0][0], main[0]["second"], several=several)
    else:
        headline = f"{count} evaluation{'s' * (count > 1)}, with nothing to compare; the results are below."
    return Conclusion(headline, tone, lines)


def _accuracy(name: str, task: str, score: TaskScore) -> str:
    if score.avg_at_k is None:
        return f"{task}: {name} has no score ({score.reason})."
    mean, low, high = (f"{100 * share:.1f}" for share in (score.avg_at_k.mean, *score.avg_at_k.ci95))
    return f"{task}: {name} reaches Avg@{score.avg_at_k.k} {mean} % [{low}, {high}] on {score.n_problems} problems."


def _headline(main: Sequence[Difference], first: str, second: str, *, several: bool = False) -> tuple[str, str]:
    """One sentence and its tone; ``several`` second models are named with their tasks."""
    outcomes = [outcome(d["ci95"], d["p_value"]) for d in main]
    tone = outcomes[0] if len(set(outcomes)) == 1 else "open"
    if len(main) == 1:
        on = f"better than {first} on {main[0]['task']}"
        words = {"better": f"is {on}", "worse": f"is not {on}; it is worse", "open": f"is not shown to be {on}"}
        return f"{second} {words[tone]}: {_numbers(main[0])}.", tone
    parts = []
    for kind, how in (("better", "better"), ("worse", "worse"), ("open", "no difference shown")):
        group = [d for d, found in zip(main, outcomes, strict=True) if found == kind]
        subjects = [f"{d['second']}, {d['task']}" if several else d["task"] for d in group]
        if group:
            parts.append(f"{how} on {len(group)} of {len(main)} ({'; '.join(subjects)})")
    subject = f"Compared with {first}" if several else f"{second} against {first}"
    if not several and "better" not in outcomes:
        subject = f"{second} is not shown to be better than {first} on any comparison"
    return f"{subject}: {'; '.join(parts)}.", tone


def _numbers(d: Difference) -> str:
    change, low, high = (f"{100 * share:+.1f}" for share in (d["difference"], *d["ci95"]))
    p = f"p = {d['p_value']:.3f}" if d["p_value"] >= 0.001 else "p < 0.001"
    return f"{change} points [{low}, {high}], {p}".replace("-", "−")


def _by_task(evaluations: Named, value: Callable[[TaskScore], Any]) -> dict[str, list[tuple[str, Any]]]:
    """Each model's name and value, by task in the order in which tasks first appear; without what is missing."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for task in dict.fromkeys(task for _, evaluation in evaluations for task in evaluation.tasks):
        values = [(name, value(e.tasks[task])) for name, e in evaluations if task in e.tasks]
        if present := [(name, one) for name, one in values if one]:
            found[task] = present
    return found


@styled(axes__grid__axis="x")
def average_dots(evaluations: Named) -> Figure | None:
    """Avg@K with its 95 % interval, one row per model and one panel per task; None where nothing was scored."""
    tasks = _by_task(evaluations, lambda score: score.avg_at_k)
    if not tasks:
        return None
    look = looks([name for name, _ in evaluations])
    rows = [len(scored) for scored in tasks.values()]
    height = 0.75 + sum(0.36 * n + 0.5 for n in rows)
    figure, panels = grid(len(tasks), 1, 7.2, height, sharex=True, height_ratios=[n + 0.6 for n in rows])
    for axes, (task, scored) in zip(panels, tasks.items(), strict=True):
        for row, (name, value) in enumerate(scored):
            (colour, marker), mean, (low, high) = look[name], 100 * value.mean, value.ci95
            axes.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
            axes.plot(mean, row, marker=marker, color=colour, markersize=8, linestyle="none")
            place: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{mean:.1f}", (100 * high, row), fontsize=9, **place)
        axes.set_yticks(range(len(scored)), [name for name, _ in scored])
        axes.set_ylim(len(scored) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_title(f"{task}: Avg@{scored[0][1].k} with 95 % interval")
        axes.margins(x=0.12)
    panels[-1].set_xlabel("accuracy (%)")
    return figure


@styled()
def pass_curves(evaluations: Named) -> Figure | None:
    """Pass@K against K with 95 % bands, one panel per task; None where no task has more than one K."""
    tasks = _by_task(evaluations, lambda score: score.pass_at_k if len(score.pass_at_k) > 1 else None)
    if not tasks:
        return None
    look = looks([name for name, _ in evaluations])
    columns = min(2, len(tasks))
    figure, panels = grid(len(tasks), columns, 7.2 if columns == 1 else 8.4, 3.0 * -(-len(tasks) // columns) + 0.5)
    for axes, (task, curves) in zip(panels, tasks.items(), strict=True):
        for name, points in curves:
            (colour, marker), x = look[name], [point.k for point in points]
            axes.plot(x, [100 * p.mean for p in points], color=colour, marker=marker, label=name)
            low, high = ([100 * p.ci95[side] for p in points] for side in (0, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        ks = sorted({point.k for _, points in curves for point in points})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # the axis must not run below 0 where nothing is solved
        axes.set(title=task, xlabel="K samples per problem", ylabel="Pass@K (%)")
    legend_below(figure)
    panels[0].set_title("bands: 95 % intervals", loc="right", fontsize=8.5, fontweight="normal", color=SOFT)
    return figure


def tables(evaluations: Named) -> list[tuple[str, list[int], list[tuple[str, TaskScore, dict[int, Estimate]]]]]:
    """Of each task: its name, every K above 1 with a Pass@K, and each model's name, score and Pass@K by K."""
    found = []
    for task, scores in _by_task(evaluations, lambda score: score).items():
        rows = [(name, score, {point.k: point for point in score.pass_at_k}) for name, score in scores]
        found.append((task, sorted({k for _, _, passes in rows for k in passes} - {1}), rows))
    return found
