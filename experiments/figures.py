"""Draws the figures of docs/evidence.md from the result files; nothing is trained or evaluated.

Run ``make figures``, or ``python -m experiments.figures [NAME ...]``; PNG files in ``docs/images/evidence``. Figures
whose results do not exist are skipped with a message.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bupo.report.inside_figures import training_figure
from bupo.report.results import TrainingReading
from bupo.report.style import BLUE, CYCLE, INK, MARKERS, RED, SOFT, layer_axis, new_figure, save, styled
from bupo.report.sweeps import Sweep, learning_curves
from bupo.sweep.rows import Rows, read_rows
from experiments import record
from experiments.summary import RESULTS, read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images" / "evidence"


def result(name: str) -> Any:
    """A table of `experiments.summary`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# -- comparisons -------------------------------------------------------------------------------------------------------


def record_differences() -> Figure:
    """Draw the differences of the runs of record from GRPO, one panel per task and metric.

    Each seed is a small dot, the interval over seeds and problems a line, the interval over problems a pale band.
    """
    found = result("record")["families"]["end"]
    titles = {
        "primary": "Held-out, Avg@8",
        "Pass@8": "Held-out, Pass@8",
        "harder": "Harder, Avg@8",
    }
    with styled(axes__grid__axis="x"):
        figure = new_figure(8.4, 1.2 + 0.45 * len(found))
        for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
            for place, row in enumerate(found):
                away = row["primary"] if key == "primary" else row["secondary"][key]
                _difference(axes, place, away, CYCLE[place + 1])  # as in the curves, after GRPO
            axes.axvline(0, color=SOFT, linewidth=1.2)
            axes.set_yticks(range(len(found)), [record.NAMES[row["arm"]] for row in found])
            axes.set_ylim(len(found) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("points above GRPO")
    return figure


def _difference(axes: Axes, place: int, away: dict[str, Any], colour: str) -> None:
    axes.plot(away["each"], [place] * len(away["each"]), ".", color=colour, alpha=0.45, markersize=7)
    axes.plot(away["ci_problems"], [place, place], color=colour, alpha=0.2, linewidth=9, solid_capstyle="butt")
    if away["ci_both"]:
        axes.plot(away["ci_both"], [place, place], color=colour, linewidth=2.2)
    axes.plot(away["mean"], place, marker="o", color=colour, markersize=8, markeredgecolor="white")


def record_curves() -> Figure:
    """Draw the reward of the main arms of the runs of record: means over seeds, bands of two standard errors."""
    rows = read_rows(RESULTS / "record.jsonl")
    return learning_curves(Sweep({record.NAMES[arm]: rows[arm] for arm in ["grpo", *record.MAIN] if arm in rows}))


def _task(name: str) -> str:
    names = {"arithmetic": "Held-out", "arithmetic-hard": "Harder", "held-out": "Held-out", "shifted": "Shifted"}
    return names.get(name, name)


def steps() -> Figure:
    """Accuracy against the length of the internal phase (as in Table 2), with the guarded run as a band."""
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


def curves(
    name: str,
    arms: dict[str, str],
    switch: int | None = None,
    *,
    near: int = 2,
    shown: int = 3,
    seeds: Sequence[int] = (0, 1, 2),
    each: bool = False,
) -> Callable[[], Figure]:
    """Draw reward, entropy and length over training (as in Figures 4 and 7).

    Args:
        name: the file of result lines.
        arms: label per arm.
        switch: the rollout batch after which the internal phase ends, drawn as a line.
        near: points are means over this many rollout batches to each side, and over the seeds that all arms have.
        shown: number of panels.
        seeds: the seeds to draw.
        each: draw a thin line per seed, too.
    """
    return lambda: _draw_curves(read_rows(RESULTS / f"{name}.jsonl"), arms, switch, near, shown, seeds, each)


def _draw_curves(
    rows: Rows, arms: dict[str, str], switch: int | None, near: int, shown: int, seeds: Sequence[int], each: bool
) -> Figure:
    arms = {arm: label for arm, label in arms.items() if arm in rows}
    seeds = [seed for seed in seeds if all(seed in rows[arm] for arm in arms)]
    panels = (
        ("reward", "Reward"),
        ("entropy", "Entropy of the full policy (nats)"),
        ("mean_length", "Response length (tokens)"),
    )
    with styled():
        figure = new_figure(3.2 * shown, 3.4)
        for axes, (name, title) in zip(figure.subplots(1, shown), panels[:shown], strict=True):
            for number, (arm, label) in enumerate(arms.items()):
                have = [rows[arm][s]["curves"][name] for s in seeds]
                points = []
                for i in range(min(map(len, have))):
                    values = [v for c in have for v in c[max(0, i - near) : i + near + 1] if v is not None]
                    points.append(statistics.fmean(values) if values else float("nan"))
                colour = INK if arm in ("grpo", "grpo20") else CYCLE[number]
                for one in have if each else ():
                    axes.plot(range(1, len(one) + 1), one, color=colour, alpha=0.3, linewidth=1)
                axes.plot(range(1, len(points) + 1), points, color=colour, label=label)
            if switch:
                axes.axvline(switch + 0.5, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(f"rollout batch{' (mean of five)' if near == 2 else ''}")
            axes.set_ylim(bottom=0)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return figure


INSIDE = (("GRPO", "grpo", None), ("BuPO, 8 batches", "bupo", 8.0), ("layer 4 throughout", "steps45", None))


def inside() -> Figure:
    """Measurements inside the model over training (as in Figure 5): means over seeds; bands are two standard errors."""
    rows = read_rows(RESULTS / "inside.jsonl")
    runs = []
    for name, arm, switch in INSIDE:
        if arm in rows:
            readings = over_seeds([row["inside"] for row in rows[arm].values()])
            runs.append((name, [TrainingReading.parse({"schema": 1, **reading}) for reading in readings], switch))
    return training_figure(runs)


def over_seeds(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join several runs' measurements into one sequence: means, and in ``change`` their standard errors over runs."""
    joined = []
    for at in zip(*runs, strict=True):
        changes = [[_minus(now[n]["mean"], then[n]["mean"]) for now, then in zip(at, _firsts(runs), strict=True)]
                   for n in ("entropy", "cosine_of_layer", "divergence")]  # fmt: skip
        item: dict[str, Any] = {k: at[0][k] for k in ("rollouts_done", "layer", "layers")}
        item["perplexity"] = {"value": statistics.fmean(r["perplexity"]["value"] for r in at)}
        ratios = [r["perplexity"]["value"] / f["perplexity"]["value"] for r, f in zip(at, _firsts(runs), strict=True)]
        item["change"] = {"perplexity_ratio": {"value": statistics.fmean(ratios), "standard_error": _error(ratios)}}
        for name, change in zip(("entropy", "cosine_of_layer", "divergence"), changes, strict=True):
            item[name] = {"mean": [statistics.fmean(v) for v in zip(*(r[name]["mean"] for r in at), strict=True)]}
            item["change"][name] = {"standard_error": [_error(list(v)) for v in zip(*change, strict=True)]}
        joined.append(item)
    return joined


def _firsts(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [run[0] for run in runs]


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _error(found: list[float]) -> float:
    return statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0


# -- architectures -----------------------------------------------------------------------------------------------------


def styles() -> Figure:
    """Entropy of the layer policies and FFN entropy change by architecture, tying and data; one thin line per seed."""
    lines = read_lines(RESULTS / "styles.jsonl")
    names = {
        (False, "worked"): "untied", (True, "worked"): "tied", (False, "bare"): "untied, answers only",
        (False, "longer"): "untied, trained longer",
    }  # fmt: skip
    kinds = [(tied, data) for tied, data in names if _some(lines, tied, data)]
    rows: tuple[tuple[str, Callable[[dict], list[float]]], ...] = (
        ("Entropy of the layer policy (nats)", lambda r: r["sites"]["layer_out"]),
        ("the same through the final norm", lambda r: r["curves"]["norm"]["entropy"]),
        ("FFN entropy change (nats)", lambda r: r["entropy_change"]["ffn"]),
    )
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
                if row < 2:
                    axes.set_ylim(bottom=0)
                else:
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
    "record": record_differences,
    "record_curves": record_curves,
    "twice_smollm2": curves(
        "smollm2", {"grpo20": "GRPO", "bupo20": "BuPO, layer 6"}, 2, near=0, shown=2, seeds=range(5), each=True
    ),
    "steps": steps,
    "layer_dynamics": curves(
        "small",
        {"grpo": "GRPO", "layer2": "layer 2", "bupo": "layer 4", "layer6": "layer 6", "layer8": "layer 8"},
        switch=8,
    ),
    "inside": inside,
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
