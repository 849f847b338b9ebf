"""The figures of docs/evidence.md, drawn from the result files alone (nothing is trained or read anew).

Command: ``make figures``, or ``python experiments/figures.py [NAME ...]``; PNG files in ``docs/images/evidence``. A
figure whose results are not there is left out with a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from summary import RESULTS, Rows, read

from bupo.report.style import BLUE, CYCLE, INK, MARKERS, RED, SOFT, layer_axis, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images" / "evidence"
NAMES = {
    "grpo": "GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++", "bupo": "BuPO", "norm": "BuPO, final norm",
    "temperature": "BuPO, fitted temperature", "frozen4": "GRPO, layers 1-4 frozen",
    "upper0.1": "GRPO, 0.1 x rate above 4", "layer2": "BuPO, layer 2", "layer6": "BuPO, layer 6",
    "layer8": "BuPO, layer 8",
}  # fmt: skip


def result(name: str) -> Any:
    """A table of `experiments/summary.py`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# -- comparisons -------------------------------------------------------------------------------------------------------


def dots(name: str) -> Callable[[], Figure]:
    """Differences from the baseline, a panel a task and metric: seeds as small dots, the mean with its interval."""

    def draw() -> Figure:
        found = result(name)
        panels = [(task, metric, t) for task, metrics in found["tasks"].items() for metric, t in metrics.items()]
        with styled(axes__grid__axis="x"):
            figure = new_figure(8.4, 0.9 + 1.15 * max(len(t.get("minus_baseline", {})) for _, _, t in panels))
            grid = figure.subplots(2, (len(panels) + 1) // 2, squeeze=False, sharey=True)
            for axes, (task, metric, table) in zip(grid.T.flat, panels, strict=False):
                _difference_panel(axes, table)
                base = table["arms"][table["baseline"]]["mean"]
                axes.set_title(f"{_task(task)}, {metric.capitalize()}", fontsize=10)
                axes.set_xlabel(f"points over {NAMES[table['baseline']]} ({base:.1f} %; start {table['start']:.1f} %)")
        return figure

    return draw


def _difference_panel(axes: Axes, table: dict[str, Any]) -> None:
    rows = list(table["minus_baseline"].items())
    for place, (arm, away) in enumerate(rows):
        colour, marker = (RED, "^") if arm == "bupo" else (CYCLE[0], "o")
        axes.plot(list(away["each"].values()), [place] * len(away["each"]), ".", color=colour, alpha=0.45, markersize=7)
        if "ci95" in away:
            axes.plot(away["ci95"], [place, place], color=colour, linewidth=2.2)
        axes.plot(away["mean"], place, marker=marker, color=colour, markersize=8, markeredgecolor="white")
    axes.axvline(0, color=SOFT, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [NAMES.get(arm, arm) for arm, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _task(name: str) -> str:
    return {"arithmetic": "Held-out", "arithmetic-hard": "Harder"}.get(name, name)


def steps() -> Figure:
    """Accuracy against the length of the internal phase, with the guarded run as a band beside it (Table 2's shape)."""
    found = result("guard")
    with styled():
        figure = new_figure(8.4, 3.4)
        panels = figure.subplots(1, len(found["tasks"]))
        for axes, (task, metrics) in zip(panels, found["tasks"].items(), strict=True):
            metric = next(iter(metrics))
            table = metrics[metric]
            rows = [(a["changes"]["internal_steps"], a) for n, a in table["arms"].items() if n != "auto45"]
            rows.sort(key=lambda row: row[0])
            for at, arm in rows:
                each = list(arm["each"].values())
                axes.plot([at] * len(each), each, ".", color=BLUE, alpha=0.45, markersize=7)
            means = [arm["mean"] for _, arm in rows]
            axes.plot([at for at, _ in rows], means, color=BLUE, marker="o", label="fixed")
            guarded = table["arms"].get("auto45")
            if guarded:
                axes.axhline(guarded["mean"], color=RED, linewidth=1.8, label="guarded, at most 45")
                axes.axhspan(min(guarded["each"].values()), max(guarded["each"].values()), color=RED, alpha=0.13)
            axes.axhline(table["start"], color=SOFT, linestyle=(0, (4, 2)), linewidth=1.2, label="before training")
            axes.set_title(f"{_task(task)}, {metric.capitalize()} (%)")
            axes.set_xlabel("rollout batches of the internal phase, of 45")
            axes.set_ylim(bottom=0)
        panels[0].legend(loc="lower left")
    return figure


# -- dynamics ----------------------------------------------------------------------------------------------------------


def layers() -> Figure:
    """Reward, entropy and length over training by the layer of the internal phase (Figures 4 and 7's shape)."""
    rows = read(RESULTS / "small.jsonl")
    arms = [("GRPO", "grpo"), ("layer 2", "layer2"), ("layer 4", "bupo"), ("layer 6", "layer6"), ("layer 8", "layer8")]
    return _curves(rows, arms, (0, 1, 2), 8)


def dynamics() -> Figure:
    """The same by the length of the internal phase."""
    rows = read(RESULTS / "small.jsonl")
    arms = [("0 (GRPO)", "grpo"), ("8", "bupo"), ("16", "steps16"), ("30", "steps30"), ("45", "steps45")]
    return _curves(rows, arms, (0, 1, 2), None)


def _curves(rows: Rows, arms: Sequence[tuple[str, str]], seeds: Sequence[int], switch: int | None) -> Figure:
    """Means over the seeds, smoothed over five rollout batches; perplexity where the log has it (internal phase)."""
    panels = (
        ("reward", "Reward"),
        ("entropy", "Entropy of the full policy (nats)"),
        ("mean_length", "Response length (tokens)"),
    )
    with styled():
        figure = new_figure(9.6, 3.4)
        for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
            for number, (label, arm) in enumerate(arms):
                have = [rows[arm][s]["curves"][name] for s in seeds if s in rows.get(arm, {})]
                if not have:
                    continue
                points = []
                for i in range(min(map(len, have))):
                    near = [v for c in have for v in c[max(0, i - 2) : i + 3] if v is not None]
                    points.append(statistics.fmean(near) if near else float("nan"))
                colour = INK if arm == "grpo" else CYCLE[number]
                axes.plot(range(1, len(points) + 1), points, color=colour, label=label)
            if switch:
                axes.axvline(switch + 0.5, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("rollout batch")
            axes.set_ylim(bottom=0)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return figure


# -- architectures -----------------------------------------------------------------------------------------------------


def styles() -> Figure:
    """Entropy of the layer policies and FFN entropy change by architecture, tying and data; a thin line a seed."""
    lines = [json.loads(line) for line in (RESULTS / "styles.jsonl").read_text().splitlines()]
    kinds = [(t, d) for t, d in ((False, "worked"), (True, "worked"), (False, "bare")) if _some(lines, t, d)]
    rows: tuple[tuple[str, Callable[[dict], list[float]]], ...] = (
        ("Entropy of the layer policy (nats)", lambda r: r["sites"]["layer_out"]),
        ("the same through the final norm", lambda r: r["curves"]["norm"]["entropy"]),
        ("FFN entropy change (nats)", lambda r: r["entropy_change"]["ffn"]),
    )
    names = {
        (False, "worked"): "untied", (True, "worked"): "tied", (False, "bare"): "untied, answers only",
    }  # fmt: skip
    with styled():
        figure = new_figure(9.0, 7.4)
        grid = figure.subplots(3, len(kinds), squeeze=False, sharex=True, sharey="row")
        for column, (tied, data) in enumerate(kinds):
            for row, (title, curve) in enumerate(rows):
                axes = grid[row][column]
                for arch, colour in (("qwen3", BLUE), ("llama", RED)):
                    mine = [curve(r) for r in _some(lines, tied, data) if r["arch"] == arch]
                    for found in mine:
                        axes.plot(range(1, len(found) + 1), found, color=colour, alpha=0.3, linewidth=1)
                    if mine:
                        mean = [statistics.fmean(values) for values in zip(*mine, strict=True)]
                        label = {"qwen3": "Qwen3 style", "llama": "Llama style"}[arch]
                        axes.plot(range(1, len(mean) + 1), mean, color=colour, marker=MARKERS[0], label=label)
                layer_axis(axes, lines[0]["layers"])
                if row == 2:
                    axes.axhline(0, color=SOFT, linewidth=1.2)
                    axes.set_xlabel("layer")
                if column == 0:
                    axes.set_ylabel(title, fontsize=9)
                if row == 0:
                    axes.set_title(names[tied, data])
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _some(lines: list[dict[str, Any]], tied: bool, data: str) -> list[dict[str, Any]]:
    return [row for row in lines if (row["tied"], row["data"]) == (tied, data)]


FIGURES: dict[str, Callable[[], Figure]] = {
    "main": dots("main"),
    "main_smollm2": dots("main_smollm2"),
    "steps": steps,
    "dynamics": dynamics,
    "layer": dots("layers"),
    "layer_dynamics": layers,
    "reading": dots("reading"),
    "rates": dots("rates"),
    "styles": styles,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], default=[])
    args = parser.parse_args()
    for name in args.names or FIGURES:
        try:
            figure = FIGURES[name]()
        except (FileNotFoundError, KeyError) as error:
            print(f"{name}: left out, no results yet ({error})", file=sys.stderr)
            continue
        png, svg = save(figure, FOLDER, name)
        svg.unlink()
        print(png.relative_to(FOLDER.parents[2]))


if __name__ == "__main__":
    main()
