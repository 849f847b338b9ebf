"""Figures of training runs and of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bupo.report.logs import last_internal_rollout, series
from bupo.report.style import SOFT, looks, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("reward", "Reward", "mean reward"),
    ("entropy", "Entropy", "nats a token"),
    ("length", "Response length", "tokens"),
    ("clip", "Clip fraction", "share of tokens"),
)


def training_curves(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Reward, entropy, response length and clip fraction over rollout batches, the runs overlaid.

    A dashed vertical line stands where a run goes from its internal phase to the full policy. Faint lines are the
    values, bold ones their running means (over about a tenth of the run, never across that line).

    Args:
        runs: name and rows of ``log.jsonl``.
    """
    from matplotlib.ticker import MaxNLocator

    look = looks([name for name, _ in runs])
    panels = [panel for panel in PANELS if any(series(log, panel[0])[0] for _, log in runs)]
    with styled():
        rows = (len(panels) + 1) // 2
        figure = new_figure(8.4, 2.5 * rows + 0.5)
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True).flat
        for axes, (name, title, unit) in zip(grid, panels, strict=False):
            for label, log in runs:
                colour = look[label][0]
                _curve(axes, *series(log, name), label, colour, last_internal_rollout(log))
                if name == "entropy" and (inner := series(log, "internal_entropy"))[0]:
                    axes.plot(*inner, color=colour, linewidth=1.5, linestyle=":", label=f"{label}, internal policy")
                if (at := last_internal_rollout(log)) is not None:
                    shown = f"{label}, internal phase ends"
                    axes.axvline(at + 0.5, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=shown)
            axes.set_title(title)
            axes.set_ylabel(unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        shown_axes = list(figure.axes)[: len(panels)]
        for axes in list(figure.axes)[len(panels) :]:
            axes.remove()
        for axes in shown_axes[-2:]:
            axes.set_xlabel("rollout batch")
            axes.tick_params(labelbottom=True)
        entries = {
            text: handle for axes in shown_axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, len(entries)))
    return figure


def _curve(axes: Axes, x: list[float], y: list[float], label: str, colour: str, switch: float | None) -> None:
    width = max(1, round(len(y) / 10))
    if width < 3:
        axes.plot(x, y, color=colour, label=label)
        return
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=1)
    half = width // 2
    for phase in (True, False):
        part = [i for i, at in enumerate(x) if (switch is not None and at <= switch) is phase]
        near = [[y[j] for j in part if abs(j - i) <= half] for i in part]
        axes.plot([x[i] for i in part], [sum(n) / len(n) for n in near], color=colour, label=label if part else None)


def average_dots(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure | None:
    """Avg@K with its 95 % interval: a row a model, a group a task. None where nothing was scored.

    Args:
        evaluations: name and content of ``results.json``.
    """
    look = looks([name for name, _ in evaluations])
    groups = [(task, found) for task in tasks_of(evaluations) if (found := _scored(evaluations, task, "avg_at_k"))]
    if not groups:
        return None
    with styled(axes__grid__axis="x"):
        rows = sum(len(found) for _, found in groups)
        figure = new_figure(7.2, 0.75 + 0.36 * rows + 0.5 * len(groups))
        panels = figure.subplots(
            len(groups), 1, squeeze=False, sharex=True, height_ratios=[len(f) + 0.6 for _, f in groups]
        )
        for axes, (task, found) in zip(panels.flat, groups, strict=True):
            for row, (name, value) in enumerate(found):
                low, high = value["ci95"]
                colour, marker = look[name]
                axes.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
                axes.plot(100 * value["mean"], row, marker=marker, color=colour, markersize=8, linestyle="none")
                axes.annotate(
                    f"{100 * value['mean']:.1f}", (100 * high, row), xytext=(7, 0), textcoords="offset points",
                    va="center", fontsize=9,
                )  # fmt: skip
            axes.set_yticks(range(len(found)), [name for name, _ in found])
            axes.set_ylim(len(found) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_title(f"{task}: Avg@{found[0][1]['k']} with 95 % interval")
            axes.margins(x=0.12)
        panels.flat[-1].set_xlabel("accuracy (%)")
    return figure


def pass_curves(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure | None:
    """Pass@K against K with 95 % bands, a panel a task. None where no task has more than one K."""
    from matplotlib.ticker import FixedLocator, NullLocator

    groups = [
        (task, found)
        for task in tasks_of(evaluations)
        if (found := [(n, p) for n, p in _scored(evaluations, task, "pass_at_k") if len(p) > 1])
    ]
    if not groups:
        return None
    look = looks([name for name, _ in evaluations])
    columns = min(2, len(groups))
    rows = (len(groups) + columns - 1) // columns
    with styled():
        figure = new_figure(7.2 if columns == 1 else 8.4, 3.0 * rows + 0.5)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        entries = {}
        for axes, (task, found) in zip(panels, groups, strict=False):
            ks = sorted({point["k"] for _, points in found for point in points})
            for name, points in found:
                colour, marker = look[name]
                x = [point["k"] for point in points]
                low, high = ([100 * point["ci95"][side] for point in points] for side in (0, 1))
                (entries[name],) = axes.plot(
                    x, [100 * p["mean"] for p in points], color=colour,
                    marker=marker, label=name,
                )  # fmt: skip
                axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(ks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.set_xlabel("K samples a problem")
            axes.set_ylabel("Pass@K (%)")
            axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # nothing solved is no reason for a negative axis
            axes.set_title(task)
        for axes in panels[len(groups) :]:
            axes.remove()
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(4, len(entries)))
        figure.axes[0].set_title("bands: 95 % intervals", loc="right", fontsize=8.5, fontweight="normal", color=SOFT)
    return figure


def tasks_of(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Names of all tasks, in the order in which they first appear."""
    return list(dict.fromkeys(task for _, results in evaluations for task in results.get("tasks", {})))


def _scored(evaluations: Sequence[tuple[str, Mapping[str, Any]]], task: str, key: str) -> list[tuple[str, Any]]:
    found = [(name, results.get("tasks", {}).get(task, {}).get(key)) for name, results in evaluations]
    return [(name, value) for name, value in found if value]
