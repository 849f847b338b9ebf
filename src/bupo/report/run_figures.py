"""Figures of training runs and of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from bupo.report.logs import TrainingRun, last_internal_rollout, series
from bupo.report.results import Estimate, Evaluation
from bupo.report.style import SOFT, legend_below, looks, new_figure, styled, titled

_PANELS = (
    ("reward", "Reward", "mean reward"),
    ("entropy", "Entropy", "nats per token"),
    ("length", "Response length", "tokens"),
    ("clip", "Clip fraction", "share of tokens"),
)


def training_curves(runs: Sequence[tuple[str, TrainingRun]]) -> Figure:
    """Reward, entropy, response length and clip fraction over rollout batches, the runs overlaid.

    A dashed vertical line marks the switch from the internal phase to the full policy. Faint lines are the values,
    bold ones their running means (over about a tenth of the run, never across that line).

    Args:
        runs: training runs and their names.
    """
    look = looks([name for name, _ in runs])
    panels = [panel for panel in _PANELS if any(series(run.log, panel[0])[0] for _, run in runs)]
    with styled():
        rows = (len(panels) + 1) // 2
        figure = new_figure(8.4, 2.5 * rows + 0.5)
        grid = list(figure.subplots(rows, 2, squeeze=False, sharex=True).flat)
        for axes, (name, title, unit) in zip(grid, panels, strict=False):
            titled(axes, title, unit)
            for label, run in runs:
                colour = look[label][0]
                log, switch = run.log, last_internal_rollout(run.log)
                _curve(axes, *series(log, name), label, colour, switch)
                if name == "entropy" and (internal := series(log, "internal_entropy"))[0]:
                    axes.plot(*internal, color=colour, linewidth=1.5, linestyle=":", label=f"{label}, internal policy")
                if switch is not None:
                    dashes: Any = (0, (4, 3))
                    phase = f"{label}, internal phase ends"
                    axes.axvline(switch + 0.5, color=colour, linewidth=1.2, linestyle=dashes, label=phase)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes in grid[: len(panels)][-2:]:
            axes.set_xlabel("rollout batch")
            axes.tick_params(labelbottom=True)
        legend_below(figure, columns=3)
    return figure


def _curve(axes: Axes, x: list[float], y: list[float], label: str, colour: str, switch: float | None) -> None:
    """Values and their running mean, which starts again at the switch of phases."""
    half = round(len(y) / 10) // 2
    if half < 1:
        axes.plot(x, y, color=colour, label=label)
        return
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=1)
    for internal in (True, False):
        phase = [i for i, at in enumerate(x) if (switch is not None and at <= switch) is internal]
        windows = [[y[j] for j in phase if abs(j - i) <= half] for i in phase]
        means = [sum(window) / len(window) for window in windows]
        axes.plot([x[i] for i in phase], means, color=colour, label=label if phase else None)


def average_dots(evaluations: Sequence[tuple[str, Evaluation]]) -> Figure | None:
    """Avg@K with its 95 % interval, one row per model and one panel per task; None where nothing was scored."""
    look = looks([name for name, _ in evaluations])
    panels: dict[str, list[tuple[str, Estimate]]] = {}
    for task in task_names(evaluations):
        scores = [(name, e.tasks[task].avg_at_k) for name, e in evaluations if task in e.tasks]
        if scored := [(name, average) for name, average in scores if average is not None]:
            panels[task] = scored
    if not panels:
        return None
    with styled(axes__grid__axis="x"):
        figure = new_figure(7.2, 0.75 + sum(0.36 * len(scored) + 0.5 for scored in panels.values()))
        grid = figure.subplots(
            len(panels), 1, squeeze=False, sharex=True, height_ratios=[len(scored) + 0.6 for scored in panels.values()]
        ).flat
        for axes, (task, scored) in zip(grid, panels.items(), strict=True):
            for row, (name, value) in enumerate(scored):
                low, high = value.ci95
                colour, marker = look[name]
                axes.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
                axes.plot(100 * value.mean, row, marker=marker, color=colour, markersize=8, linestyle="none")
                axes.annotate(
                    f"{100 * value.mean:.1f}", (100 * high, row), xytext=(7, 0), textcoords="offset points",
                    va="center", fontsize=9,
                )  # fmt: skip
            axes.set_yticks(range(len(scored)), [name for name, _ in scored])
            axes.set_ylim(len(scored) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_title(f"{task}: Avg@{scored[0][1].k} with 95 % interval")
            axes.margins(x=0.12)
        figure.axes[-1].set_xlabel("accuracy (%)")
    return figure


def pass_curves(evaluations: Sequence[tuple[str, Evaluation]]) -> Figure | None:
    """Pass@K against K with 95 % bands, one panel per task; None where no task has more than one K."""
    panels: dict[str, list[tuple[str, list[Estimate]]]] = {}
    for task in task_names(evaluations):
        curves = [(name, e.tasks[task].pass_at_k) for name, e in evaluations if task in e.tasks]
        if several := [(name, points) for name, points in curves if len(points) > 1]:
            panels[task] = several
    if not panels:
        return None
    look = looks([name for name, _ in evaluations])
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with styled():
        figure = new_figure(7.2 if columns == 1 else 8.4, 3.0 * rows + 0.5)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (task, curves) in zip(grid, panels.items(), strict=False):
            for name, points in curves:
                colour, marker = look[name]
                x = [point.k for point in points]
                axes.plot(x, [100 * p.mean for p in points], color=colour, marker=marker, label=name)
                low, high = ([100 * p.ci95[side] for p in points] for side in (0, 1))
                axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            ks = sorted({point.k for _, points in curves for point in points})
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(ks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.set_xlabel("K samples per problem")
            axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # the axis must not run below 0 where nothing is solved
            titled(axes, task, "Pass@K (%)")
        for axes in grid[len(panels) :]:
            axes.remove()
        legend_below(figure)
        figure.axes[0].set_title("bands: 95 % intervals", loc="right", fontsize=8.5, fontweight="normal", color=SOFT)
    return figure


def task_names(evaluations: Sequence[tuple[str, Evaluation]]) -> list[str]:
    """Names of all tasks, in the order in which they first appear."""
    return list(dict.fromkeys(task for _, evaluation in evaluations for task in evaluation.tasks))


def pass_ks(evaluations: Sequence[tuple[str, Evaluation]], task: str) -> list[int]:
    """Every K above 1 for which a model has Pass@K on the task."""
    scores = [evaluation.tasks[task] for _, evaluation in evaluations if task in evaluation.tasks]
    return sorted({point.k for score in scores for point in score.pass_at_k} - {1})
