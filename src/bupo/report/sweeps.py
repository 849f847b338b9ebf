"""What a sweep shows: every arm with its intervals, its effect against its cost, learning curves, and a layer map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bupo.report import style
from bupo.report.analysis_figures import READINGS, reading
from bupo.report.evaluations import Conclusion, outcome
from bupo.report.results import Analysis
from bupo.sweep.rows import START, Rows
from bupo.sweep.statistics import baseline_of, compare_arms, layer_map

CURVES = 6  # the most arms whose learning curves are drawn, in the order of the rows
LINES = 16  # the most comparisons of which all are listed in short; of more, only those that are shown
_WORDS = {"better": "better", "worse": "worse", "open": "not shown to differ"}


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep, and what follows from them by task."""

    rows: Rows

    @cached_property
    def baseline(self) -> str | None:
        return baseline_of(self.rows)

    @cached_property
    def tasks(self) -> dict[str, list[dict[str, Any]]]:
        """The arms of each task (see `compare_arms`), with a verdict on each difference."""
        names = dict.fromkeys(t for by_seed in self.rows.values() for row in by_seed.values() for t in row["tasks"])
        found = {task: compare_arms(self.rows, task, self.baseline) for task in names}
        for away in (arm["difference"] for arms in found.values() for arm in arms if arm["difference"]):
            away["outcome"] = outcome(away["ci_both"], away["p_holm"])
        return found

    @cached_property
    def maps(self) -> dict[str, list[dict[str, Any]]]:
        """The layer map of each task; empty if the arms are not single layers."""
        found = {task: layer_map(self.rows, task, self.baseline) for task in self.tasks}
        return {task: layers for task, layers in found.items() if layers}

    @property
    def drawn(self) -> list[str]:
        """The arms with learning curves that are drawn."""
        return [arm for arm in self.rows if any(row.get("curves", {}).get("reward") for row in self.rows[arm].values())]


def conclude(sweeps: Sequence[tuple[str, Sweep]]) -> Conclusion:
    """Say which differences from the baseline are shown, over seeds and problems, and of few also which are not."""
    found = [
        (task, arm["arm"], sweep.baseline, arm["difference"])
        for _, sweep in sweeps for task, arms in sweep.tasks.items() for arm in arms if arm["difference"]
    ]  # fmt: skip
    if not found:
        return Conclusion("No two arms of the sweep have a seed in common yet, so nothing is compared.")
    lines, outcomes = [], [away["outcome"] for *_, away in found]
    for task, arm, baseline, away in found:
        word, than = _WORDS[away["outcome"]], "from" if away["outcome"] == "open" else "than"
        if away["outcome"] != "open" or len(found) <= LINES:
            lines.append(f"{task}: {arm} is {word} {than} {baseline}: {_numbers(away)}.")
    kinds = [kind for kind in _WORDS if kind in outcomes]
    counts = "; ".join(f"{_WORDS[kind]} in {outcomes.count(kind)} of {len(outcomes)}" for kind in kinds)
    baselines = ", ".join(dict.fromkeys(str(baseline) for _, _, baseline, _ in found))
    headline = f"Trained arms compared with {baselines}, arm by arm and task by task: {counts}."
    return Conclusion(headline, outcomes[0] if len(kinds) == 1 else "open", lines)


def _numbers(away: Mapping[str, Any]) -> str:
    """A difference in points with its interval over seeds and problems, and Holm's p."""
    mean, *ends = (f"{100 * value:+.1f}".replace("-", "−") for value in (away["mean"], *(away["ci_both"] or ())))
    if not ends:
        return f"{mean} points with one seed, which says nothing of others"
    p = "no p-value, as all seeds differ equally" if away["p_holm"] is None else f"Holm p = {away['p_holm']:.3f}"
    return f"{mean} points [{', '.join(ends)}], {p}, {len(away['seeds'])} seeds"


@style.styled()
def effect_and_cost(sweep: Sweep) -> Figure | None:
    """Accuracy over seconds of updates, with intervals over seeds; None where no row has the seconds."""
    timed = {task: [arm for arm in arms if arm["update_seconds"] is not None] for task, arms in sweep.tasks.items()}
    timed = {task: arms for task, arms in timed.items() if arms}
    if not timed:
        return None
    look = style.looks(list(sweep.rows))
    columns, width = min(2, len(timed)), 7.2 if len(timed) == 1 else 8.4
    figure, panels = style.grid(len(timed), columns, width, 3.3 * -(-len(timed) // columns) + 0.4)
    for axes, (task, arms) in zip(panels, timed.items(), strict=True):
        for arm in arms:
            (colour, marker), x, y = look[arm["arm"]], arm["update_seconds"], 100 * arm["mean"]
            bars: Any = {"yerr": _arms(y, arm["ci_seeds"], 100), "xerr": _arms(x, arm["ci_update_seconds"], 1)}
            bars |= {"capsize": 2, "linestyle": "none", "color": colour, "marker": marker}
            axes.errorbar([x], [y], label=arm["arm"], **bars)
        for arm in sweep.tasks[task]:
            if arm["arm"] == START:
                style.level(axes, 100 * arm["mean"], linestyle=style.DASHED, label=START)
        low, high = axes.get_ylim()  # intervals of two or three seeds can go far beyond what there is
        axes.set(xlim=(0, 1.15 * max(arm["update_seconds"] for arm in arms) or 1), ylim=(max(0, low), min(100, high)))
        axes.set(title=task, xlabel="seconds of updates", ylabel="accuracy (%)")
    style.legend_below(figure, columns=6)
    return figure


def _arms(at: float, ends: tuple[float, float] | None, scale: float) -> list[list[float]] | None:
    return None if ends is None else [[at - scale * ends[0]], [scale * ends[1] - at]]


@style.styled()
def learning_curves(sweep: Sweep) -> Figure:
    """Mean reward over rollout batches of the first arms, with bands of two standard errors over seeds."""
    look, (figure, (axes,)) = style.looks(list(sweep.rows)), style.grid(1, 1, 7.2, 3.9)
    for arm in sweep.drawn[:CURVES]:
        curves = [row["curves"]["reward"] for row in sweep.rows[arm].values() if row.get("curves", {}).get("reward")]
        whole = min(map(len, curves))
        values = np.array([curve[:whole] for curve in curves], dtype=float)
        errors = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        style.line_with_band(axes, range(1, whole + 1), values.mean(axis=0), errors, (look[arm][0], ""), label=arm)
    axes.set(xlabel="rollout batch", ylabel="mean reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    style.legend_below(figure)
    return figure


@style.styled()
def layer_bars(layers: list[dict[str, Any]], sweep: Sweep, task: str, analysis: Analysis | None = None) -> Figure:
    """What training each layer alone adds to the start, with intervals over seeds and problems.

    Below it, of an analysis: how well each layer's policy agrees with the output, with boundary layer and knees.
    """
    means, readings = {arm["arm"]: arm["mean"] for arm in sweep.tasks[task]}, analysis and analysis.layer_choice
    figure, (axes, *below) = style.grid(1 + bool(readings), 1, 7.2, 5.8 if readings else 3.4)
    for row in layers:
        errors = _arms(100 * row["mean"], row["ci_both"], 100)
        axes.bar(row["layer"], 100 * row["mean"], 0.6, yerr=errors, capsize=3, color=style.SKY, ecolor=style.INK)
    style.level(axes)
    whole = 100 * (means[sweep.baseline] - means[START])
    style.level(axes, whole, color=style.BLUE, linestyle=style.DASHED, label=f"{sweep.baseline}, all layers")
    axes.set(xlabel="the one layer that is trained", ylabel="accuracy above the start (points)", title=task)
    style.layer_axis(axes, layers[-1]["layer"])
    if analysis and readings:
        reading(below[0], analysis, readings, READINGS[0])
        style.layer_axis(below[0], analysis.layers)
    style.legend_below(figure)
    return figure


def analysis_of(layers: list[dict[str, Any]], analyses: Sequence[tuple[str, Analysis]]) -> tuple[str, Analysis] | None:
    """The first analysis with readings of a model with as many layers as a layer map has."""
    fits = (one for one in analyses if one[1].layer_choice and one[1].layers == layers[-1]["layer"])
    return next(fits, None)
